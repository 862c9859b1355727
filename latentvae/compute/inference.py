"""Build faster copies of networks for inference: exact copies, or copies in bfloat16.

    exact = build_exact(net)  # `net` stays as it is
    z = encode(exact, images)

A copy shares the storage of its parameters with the original network `net`. Only converted
parameters (in bfloat16, or in channels-last order) and folded kernels (see the module `upsampling`)
have their own storage. So build a new copy after a change of `net`'s weights.

The exact copy computes in the precision of `net`. In float32 on the CPU, 3 x 3 convolutions of many
channels and positions use Winograd's algorithm, which needs fewer multiplications (see the package
`winograd`). If Winograd's algorithm is not available or not faster, feature maps are in
channels-last order, and upsampling is folded into the 3 x 3 convolutions. Activations and residual
sums are computed in place.

The fast copy has bfloat16 weights and feature maps in channels-last order. A CPU without matrix
units (AMX) is only twice as fast in bfloat16 as in float32. On such a CPU, blocks with many
channels stay in float32, because Winograd's algorithm saves more time than bfloat16 and rounds
less. The encoder of a tokenizer stays in float32, because rounding to bfloat16 would change some
tokens.
"""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from latentvae.compute.precision import has_instructions
from latentvae.compute.upsampling import (
    FoldedUpsample2D,
    fold_kernel,
    fold_upsampling,
    unfold_upsampling,
)
from latentvae.compute.winograd.convolutions import swap_convolutions
from latentvae.compute.winograd.nnpack import has_winograd
from latentvae.models import calls

# In blocks of at least this many channels, Winograd's algorithm in float32 is faster than plain
# bfloat16 convolutions.
WIDE = 256


def build_exact(net: Any) -> Any:
    """Return a faster copy with the same precision, and with the same results up to rounding."""
    copied = sharing_copy(net)
    for half in (copied.encoder, copied.decoder):
        _make_exact(half)
    return copied


def build_fast(net: Any) -> Any:
    """Return a copy of a float32 network that computes in bfloat16 where that is faster.

    Inputs and outputs are float32.
    """
    copied = sharing_copy(net)
    halves = [copied.encoder, copied.decoder]
    if calls.num_codes(net) is not None:
        _make_exact(halves.pop(0))
    for half in halves:
        _make_fast(half)
    return copied


def sharing_copy(net: Any) -> Any:
    """Return a copy of a network that shares the storage of all tensors.

    Each parameter of the copy is a new object. If the copy had the parameter objects of `net`,
    `Module.to` on the copy would also change `net`.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), False) for p in net.parameters()}
    memo |= {id(tensor): tensor.detach() for tensor in net.buffers()}
    return copy.deepcopy(net, memo)


def _make_exact(half: Any) -> None:
    parameter = next(half.parameters())
    winograd = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    _swap_blocks(half)
    if not (winograd and _winograd_pays()):
        _freeze_upsampling(half)
        half.to(memory_format=torch.channels_last)
        return
    unfold_upsampling(half)  # Winograd's algorithm needs fewer products than a folded kernel
    swap_convolutions(half)
    _freeze_upsampling(half)  # for layers that Winograd does not support


def _winograd_pays() -> bool:
    """Return whether Winograd's algorithm is faster than plain convolutions on this processor.

    Winograd's algorithm was not faster on a processor with matrix units (AMX), see
    docs/experiments/speed.md.
    """
    return has_winograd() and not has_instructions("amx_bf16")


def _make_fast(half: Any) -> None:
    _swap_blocks(half)
    _freeze_upsampling(half)

    # convert to bfloat16, except for wide parts
    wide = list(_wide_parts(half))
    kept = [(parameter, parameter.data) for part in wide for parameter in part.parameters()]
    half.to(torch.bfloat16, memory_format=torch.channels_last)
    for parameter, data in kept:
        parameter.data = data
    for part in wide:
        swap_convolutions(part)

    # casts between bfloat16 and float32 parts
    half.register_forward_pre_hook(_cast_inputs)
    half.register_forward_hook(lambda _half, _inputs, output: output.float())
    if wide:
        half.conv_norm_out.register_forward_pre_hook(_cast_inputs)
        for module in half.modules():
            if isinstance(module, (Attention, Downsample2D, FrozenUpsample2D)):
                module.register_forward_pre_hook(_cast_inputs)


def _wide_parts(half: Any) -> Iterator[nn.Module]:
    """Yield the parts of a bfloat16 encoder or decoder that stay in float32.

    If Winograd's algorithm is faster than plain convolutions, residual blocks and attention with at
    least `WIDE` channels stay in float32.
    """
    known = type(half) in (Encoder, Decoder) and isinstance(half.conv_norm_out, nn.GroupNorm)
    on_cpu = next(half.parameters()).device.type == "cpu"
    if not (known and on_cpu and _winograd_pays()):
        return
    for module in half.modules():
        if type(module) is InPlaceResnetBlock2D and module.out_channels >= WIDE:
            yield module
        elif isinstance(module, Attention) and module.query_dim >= WIDE:
            yield module


def _swap_blocks(half: nn.Module) -> None:
    for module in half.modules():
        if type(module) is ResnetBlock2D and _is_plain(module):
            module.__class__ = InPlaceResnetBlock2D


def _is_plain(block: Any) -> bool:
    """Return whether a residual block can become an `InPlaceResnetBlock2D`.

    The block must have group norms and SiLU, no scaled output, and no extra layers as in U-Nets.
    """
    return (
        block.time_emb_proj is None
        and block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm != "scale_shift"
        and block.output_scale_factor == 1.0
        and isinstance(block.norm1, nn.GroupNorm)
        and isinstance(block.nonlinearity, nn.SiLU)
    )


def _freeze_upsampling(half: nn.Module) -> None:
    fold_upsampling(half)
    modules: list[Any] = list(half.modules())
    for module in modules:
        if type(module) is FoldedUpsample2D and module.norm is None and module.name == "conv":
            module.__class__ = FrozenUpsample2D
            kernel = fold_kernel(cast(Any, module.conv).weight)
            module.register_buffer("kernel", kernel, persistent=False)


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the inputs of a module to the precision of its parameters (a forward pre-hook)."""
    parameter = next(module.parameters())
    return tuple(_cast(x, parameter) if isinstance(x, Tensor) else x for x in inputs)


def _cast(x: Tensor, parameter: Tensor) -> Tensor:
    """Return `x` in a parameter's precision, and in the memory order for this precision.

    The order for bfloat16 is channels last. The order for other precisions is torch's default. If
    `x` already has the precision, its order does not change.
    """
    if x.dtype == parameter.dtype:
        return x
    half = parameter.dtype == torch.bfloat16
    order = torch.channels_last if half else torch.contiguous_format
    return x.to(parameter.dtype, memory_format=order)


class InPlaceResnetBlock2D(ResnetBlock2D):
    """A residual block that computes in place and casts its input to the dtype of its weights."""

    def forward(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = _cast(input_tensor, self.conv1.weight)
        hidden = self.conv1(F.silu(self.norm1(x), inplace=True))
        hidden = self.conv2(F.silu(self.norm2(hidden), inplace=True))
        return hidden.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrozenUpsample2D(FoldedUpsample2D):
    """Upsampling and convolution as one operation, with a kernel that `fold_kernel` made once."""

    kernel: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv: Any = self.conv
        return F.conv_transpose2d(hidden_states, self.kernel, conv.bias, stride=2, padding=1)
