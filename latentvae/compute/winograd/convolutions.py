"""Compute convolutions in float32 on the CPU by Winograd's algorithms where they are faster.

There are two algorithms, in the modules `nnpack` and `tiles`. The choice of the algorithm depends
only on shapes and the kind of processor, so repeated computations on one machine give equal
numbers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from latentvae.compute.winograd.nnpack import has_winograd, nnpack_conv
from latentvae.compute.winograd.tiles import SIDE, tiled_conv, tiled_gradients

# Training uses NNPACK for feature maps with at least this many positions. For small maps NNPACK is
# slower, because it computes one image at a time.
TRAINING_POSITIONS = 64 * 64


@dataclass(frozen=True)
class Limits:
    """Sizes from which Winograd's algorithms are faster than plain convolutions.

    Attributes:
        channels: smallest number of channels of the input and of the output.
        positions: smallest number of positions (height times width) of a feature map for NNPACK, at
            inference.
        tiled: smallest number of channels for the algorithm in `tiles`. The key "one" is used if
            only the output or only the gradient of the input is computed. The key "both" is used if
            the gradient of the weight is computed, usually together with the gradient of the input.
    """

    channels: int
    positions: int
    tiled: dict[str, int]


def limits_of(capability: str) -> Limits:
    """Return the sizes from which Winograd's algorithms are faster, for a kind of processor.

    The sizes were measured on processors with the vector instructions AVX-512 and AVX2.

    Args:
        capability: the result of `torch.backends.cpu.get_cpu_capability()`, such as "AVX512".
    """
    if capability == "AVX512":
        return Limits(channels=32, positions=32 * 32, tiled={"one": 256, "both": 128})
    return Limits(channels=128, positions=64 * 64, tiled={"one": 128, "both": 128})


LIMITS = limits_of(torch.backends.cpu.get_cpu_capability())


class WinogradConv2d(nn.Conv2d):
    """A convolution for inference that uses Winograd's algorithm.

    The layer uses torch's own convolution for small feature maps, for inputs that are not float32
    on the CPU, and under autocast or `torch.compile`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_plain(input) or input.shape[2] * input.shape[3] < LIMITS.positions:
            return super().forward(input)
        return nnpack_conv(input, self.weight, self.bias)


class TrainedWinogradConv2d(nn.Conv2d):
    """A convolution with gradients that uses Winograd's algorithms where they are faster.

    The layer uses torch's own convolution for inputs that are not float32 on the CPU, and under
    autocast or `torch.compile`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_plain(input):
            return super().forward(input)
        return _Convolution.apply(input, self.weight, self.bias)  # pyright: ignore


def _is_plain(x: Tensor) -> bool:
    """Return whether torch's own convolution must be used for `x`.

    torch's own convolution is used if `x` is not float32 on the CPU, and under autocast or
    `torch.compile`.
    """
    known = x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 4 and len(x) > 0
    # torch.compile does not support NNPACK, and has its own kernels for plain convolutions.
    return not known or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


class _Convolution(torch.autograd.Function):
    """The function `conv2d(x, weight, bias, padding=1)`, without second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _fits_nnpack(x):
            return nnpack_conv(x, weight, bias)
        if _fits_tiles(x, weight, "one"):
            return tiled_conv(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        bias = gradient.sum((0, 2, 3)) if of_bias else None
        if of_x and _fits_nnpack(x):
            turned = weight.flip(2, 3).transpose(0, 1).contiguous()
            rest = _gradients(gradient, x, weight, of_x=False, of_weight=True) if of_weight else ()
            return nnpack_conv(gradient, turned, None), rest[1] if rest else None, bias
        return *_gradients(gradient, x, weight, of_x=of_x, of_weight=of_weight), bias


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, *, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if _fits_tiles(x, weight, "both" if of_weight else "one"):
        return tiled_gradients(gradient, x, weight, of_x=of_x, of_weight=of_weight)
    mask = [of_x, of_weight, False]
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
    )[:2]


def _fits_nnpack(x: Tensor) -> bool:
    return x.shape[2] * x.shape[3] >= TRAINING_POSITIONS and has_winograd()


def _fits_tiles(x: Tensor, weight: Tensor, asked: str) -> bool:
    """Return whether there are so many channels and tiles that the algorithm in `tiles` is faster.

    Args:
        x: input of the convolution.
        weight: kernel of the convolution.
        asked: key of `Limits.tiled`.
    """
    tiles = len(x) * x.shape[2] * x.shape[3] // SIDE**2
    narrow, wide = sorted(weight.shape[:2])
    return narrow >= LIMITS.tiled[asked] and 4 * tiles >= wide


def swap_convolutions(part: nn.Module, *, trained: bool = False) -> int:
    """Change the class of the convolutions in `part` that Winograd's algorithms can compute.

    Names, parameters and hooks do not change.

    Args:
        part: a module that contains convolutions.
        trained: use convolutions with gradients. By default, the new convolutions are for inference
            only.

    Returns:
        The number of changed convolutions.
    """
    found = [m for m in part.modules() if type(m) is nn.Conv2d and _fits(m)]
    for module in found:
        module.__class__ = TrainedWinogradConv2d if trained else WinogradConv2d
    return len(found)


def restore_convolutions(part: nn.Module) -> None:
    """Undo `swap_convolutions`, so that the layers have torch's class again."""
    for module in part.modules():
        if type(module) in (WinogradConv2d, TrainedWinogradConv2d):
            module.__class__ = nn.Conv2d


def _fits(conv: nn.Conv2d) -> bool:
    return (
        (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
        and (conv.padding, conv.padding_mode, conv.groups) == ((1, 1), "zeros", 1)
        and min(conv.in_channels, conv.out_channels) >= LIMITS.channels
    )
