"""A network whose encoder and decoder run in OpenVINO, on the CPU.

Both are traced and converted once, with upsampling folded (`upsampling`), for images of any size
and number; quantisers and the small convolutions around the latent stay with torch. There are no
gradients, and the weights are copied.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.compute.inference import sharing_copy
from latentvae.compute.upsampling import fold_upsampling
from latentvae.errors import UserError
from latentvae.models import calls

SMALL = 64  # pixels a side of the image it is traced with; any other size may follow


class CompiledHalf(nn.Module):
    """An encoder or a decoder: one tensor in, one out.

    Args:
        half: in float32 on the CPU.
        example: a small input.
        precision: that products are computed in, `"f32"` or `"bf16"`; sums are float32.
    """

    def __init__(self, half: nn.Module, example: Tensor, *, precision: str) -> None:
        super().__init__()
        openvino = _import_openvino()
        with torch.inference_mode(), warnings.catch_warnings():
            # That shapes are asked for does not fix them: what is converted follows its input.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(half, example, check_trace=False)
            model = openvino.convert_model(traced, example_input=example)
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.compiled: Any = _core().compile_model(model, "CPU", options)

    def forward(self, sample: Tensor, *others: None) -> Tensor:
        """What only other uses of a decoder give beside its input must be absent."""
        assert all(other is None for other in others)
        result = self.compiled(sample.contiguous().numpy(), share_inputs=True)
        return torch.from_numpy(result[0])


def build_openvino(net: Any, *, precision: str) -> Any:
    """A copy of a float32 network on the CPU with compiled halves. A tokenizer's encoder computes
    in float32: rounding turns codes.

    Raises:
        UserError: OpenVINO is not installed, another device, or a network that it cannot convert.
    """
    openvino = _import_openvino()
    if net.device.type != "cpu":
        raise UserError(f"optimize='openvino' runs on the CPU, not on '{net.device}'")
    if getattr(net, "config", {}).get("norm_type") == "spatial":
        raise UserError("optimize='openvino' takes no decoder with spatial norms: take 'exact'")
    copied = sharing_copy(net)
    fold_upsampling(copied)
    images = torch.zeros(1, calls.image_channels(net), SMALL, SMALL)
    received: list[Tensor] = []
    with torch.inference_mode():
        handle = copied.decoder.register_forward_pre_hook(
            lambda _module, inputs: received.append(inputs[0])
        )
        calls.decode(copied, calls.encode(copied, images))
        handle.remove()
    tokenizer = calls.num_codes(net) is not None
    try:
        copied.encoder = CompiledHalf(
            copied.encoder, images, precision="f32" if tokenizer else precision
        )
        copied.decoder = CompiledHalf(copied.decoder, received[0], precision=precision)
    except (RuntimeError, openvino.frontend.OpConversionFailure) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"OpenVINO cannot convert a {type(net).__name__}: {reason}") from error
    return copied


@cache
def _core() -> Any:
    """The process's only one, which is never given back: each sets a stack for signal handlers, and
    of two that go, the first frees the stack that the second restores. The next signal that Python
    handles, Ctrl-C too, then ends the process with a segmentation fault (OpenVINO 2026.4)."""
    return _import_openvino().Core()


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            "optimize='openvino' needs OpenVINO: `pip install latentvae[openvino]`"
        ) from error
    return openvino
