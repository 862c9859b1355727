"""Run the encoder and the decoder of a network in OpenVINO, on the CPU.

Encoder and decoder are traced and converted once, with folded upsampling (see the module
`upsampling`). The converted networks take images of any size and batches of any size. Quantisers
and the small convolutions before and after the latent still run in torch. The converted networks
compute no gradients, and have their own copy of the weights.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.compute.inference import sharing_copy
from latentvae.compute.upsampling import fold_upsampling
from latentvae.errors import UserError, first_line
from latentvae.models import calls

SMALL = 64  # side in pixels of the image for tracing. Other images may have any size


class CompiledHalf(nn.Module):
    """An encoder or decoder compiled by OpenVINO, which maps one tensor to one tensor.

    Args:
        half: the encoder or the decoder, in float32 on the CPU.
        example: a small input for tracing.
        precision: dtype of multiplications, `"f32"` or `"bf16"`. Sums are float32.
    """

    def __init__(self, half: nn.Module, example: Tensor, *, precision: str) -> None:
        super().__init__()
        openvino = _import_openvino()
        with torch.inference_mode(), warnings.catch_warnings():
            # Tracing warns where code reads shapes, but the converted model takes any shape.
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
        """Return the output for `sample`. All arguments other than `sample` must be None."""
        assert all(other is None for other in others)
        result = self.compiled(sample.contiguous().numpy(), share_inputs=True)
        return torch.from_numpy(result[0])


def build_openvino(net: Any, *, precision: str) -> Any:
    """Return a copy of a float32 network on the CPU with a compiled encoder and decoder.

    A tokenizer's encoder computes in float32, because rounding to bfloat16 would change some
    tokens.

    Args:
        net: the network, which is not changed.
        precision: dtype of multiplications, `"f32"` or `"bf16"`.

    Raises:
        UserError: OpenVINO is not installed or cannot convert the network, or the network is not
            on the CPU.
    """
    # Networks that OpenVINO cannot convert
    openvino = _import_openvino()
    if net.device.type != "cpu":
        raise UserError(f"optimize='openvino' needs a network on the CPU (got '{net.device}')")
    if getattr(net, "config", {}).get("norm_type") == "spatial":
        raise UserError(
            "optimize='openvino' cannot convert a decoder with spatial norms. Use 'exact'."
        )

    # Example inputs of the encoder and the decoder
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

    # Compilation
    tokenizer = calls.num_codes(net) is not None
    try:
        copied.encoder = CompiledHalf(
            copied.encoder, images, precision="f32" if tokenizer else precision
        )
        copied.decoder = CompiledHalf(copied.decoder, received[0], precision=precision)
    except (RuntimeError, openvino.frontend.OpConversionFailure) as error:
        said = first_line(error)
        raise UserError(f"OpenVINO cannot convert a {type(net).__name__}: {said}") from error
    return copied


@cache
def _core() -> Any:
    """Return the process's only OpenVINO `Core` object, which is never destroyed.

    Each `Core` sets a stack for signal handlers. When two `Core` objects are destroyed, the second
    one restores a stack that the first one has freed. The next signal in Python, for example
    Ctrl-C, would then end the process with a segmentation fault (OpenVINO 2026.4).
    """
    return _import_openvino().Core()


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            "optimize='openvino' needs OpenVINO. Install it with `pip install latentvae[openvino]`."
        ) from error
    return openvino
