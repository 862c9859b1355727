"""Nearest x2 upsampling and the 3 x 3 convolution after it, as one transposed convolution.

    y[2i + p] = sum_k w[k] x[(2i + p + k) // 2],  k in -1, 0, 1,  p in 0, 1

On a side, an even output reads x[i - 1] by w[-1] and x[i] by w[0] + w[1]; an odd one x[i] by
w[-1] + w[0] and x[i + 1] by w[1]. That is a transposed convolution of stride 2 and padding 1 with
the kernel (w[1], w[0] + w[1], w[-1] + w[0], w[-1]): four 2 x 2 phases, 2.25 times fewer
multiply-adds than 3 x 3 at full size, and no upsampled map in memory. At the border both leave the
same products out: the zeros around the upsampled map are the upsampled zeros around x.

The kernel is folded from the same parameters in every call, so gradients, state dicts, checkpoints
and exports are those of the plain layer; its numbers differ by rounding.

`B` batch, `I` and `O` channels in and out, `H W` space.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1)`.

    Args:
        x: (B, I, H, W).
        weight: (O, I, 3, 3).
        bias: (O,).

    Returns:
        (B, O, 2 H, 2 W).
    """
    return F.conv_transpose2d(x, fold_kernel(weight), bias, stride=2, padding=1)


def fold_kernel(weight: Tensor) -> Tensor:
    """The transposed convolution's kernel, (I, O, 4, 4), of a convolution's (O, I, 3, 3); in the
    weight's own precision, under autocast too."""
    return _fold(_fold(weight.transpose(0, 1), dim=2), dim=3)


def _fold(weight: Tensor, *, dim: int) -> Tensor:
    before, here, after = weight.split(1, dim)
    return torch.cat([after, here + after, before + here, before], dim)


class FoldedUpsample2D(Upsample2D):
    """An `Upsample2D` that folds; the plain layer where another size than the double is asked."""

    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        double = tuple(2 * side for side in hidden_states.shape[2:])
        if output_size is not None and tuple(output_size) != double:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        conv = _convolution(self)
        return upsample_conv(hidden_states, conv.weight, conv.bias)


class FoldedDCUpBlock2d(DCUpBlock2d):
    """AutoencoderDC's block, which adds a shortcut of repeated channels."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = upsample_conv(hidden_states, self.conv.weight, self.conv.bias)
        if not self.shortcut:
            return x
        return x + F.pixel_shuffle(hidden_states.repeat_interleave(self.repeats, dim=1), 2)


_FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    Upsample2D: FoldedUpsample2D,
    DCUpBlock2d: FoldedDCUpBlock2d,
}


def fold_upsampling(net: nn.Module) -> int:
    """Let every nearest x2 upsampling of `net` that a 3 x 3 convolution follows fold the two;
    returns how many there are.

    Only the class of those modules changes: names, parameters and hooks stay, and copies are
    folded too. The convolution is no longer called as a module, so hooks of its own do not fire.
    """
    found = 0
    for module in net.modules():
        if (folded := _FOLDED.get(type(module))) is not None and _can_fold(module):
            module.__class__ = folded
            found += 1
    return found


def unfold_upsampling(net: nn.Module) -> None:
    """Undo `fold_upsampling`: the stock layers again."""
    stock_class = {folded: stock for stock, folded in _FOLDED.items()}
    for module in net.modules():
        if type(module) in stock_class:
            module.__class__ = stock_class[type(module)]


def _can_fold(module: Any) -> bool:
    if not module.interpolate or getattr(module, "interpolation_mode", "nearest") != "nearest":
        return False
    conv = _convolution(module)
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
        and (conv.padding, conv.padding_mode, conv.groups) == ((1, 1), "zeros", 1)
    )


def _convolution(module: Any) -> Any:
    """Of the stock layer, which has two names for it; None without one."""
    return getattr(module, "conv", None) or getattr(module, "Conv2d_0", None)
