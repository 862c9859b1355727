"""Compute nearest x2 upsampling and the 3 x 3 convolution after it as one transposed convolution.

Along one axis, upsampling and convolution with kernel w map the input x to the output y:

    y[2i + p] = sum_k w[k] x[(2i + p + k) // 2],  k in -1, 0, 1,  p in 0, 1

For an even output position, x[i - 1] is multiplied by w[-1], and x[i] by w[0] + w[1]. For an odd
output position, x[i] is multiplied by w[-1] + w[0], and x[i + 1] by w[1]. Even and odd positions
together are the output of a transposed convolution of stride 2 and padding 1 with the kernel (w[1],
w[0] + w[1], w[-1] + w[0], w[-1]), called the folded kernel. The transposed convolution needs 2.25
times fewer multiply-adds than a 3 x 3 convolution at full size, and keeps no upsampled map in
memory. At the border, the transposed convolution gives the same result as upsampling and
convolution, because the zeros that pad x stay zeros when they are upsampled.

The folded kernel is computed from the layer's weight in every call. So gradients, state dicts,
checkpoints and exports are the same as with separate layers for upsampling and convolution. The
outputs of separate layers and of one transposed convolution differ only by rounding.

`B` batch, `I` and `O` channels in and out, `H W` height and width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1)`.

    Args:
        x: input of the upsampling with I channels, (B, I, H, W).
        weight: weight of the convolution with O output channels, (O, I, 3, 3).
        bias: bias of the convolution, (O,).

    Returns:
        The output of the convolution, (B, O, 2 H, 2 W).
    """
    return F.conv_transpose2d(x, fold_kernel(weight), bias, stride=2, padding=1)


def fold_kernel(weight: Tensor) -> Tensor:
    """Return the kernel of the transposed convolution that replaces upsampling and convolution.

    The result is (I, O, 4, 4), for I input and O output channels. The folded kernel has the
    precision of the weight, also under autocast.

    Args:
        weight: weight of the 3 x 3 convolution, (O, I, 3, 3).
    """
    return _fold(_fold(weight.transpose(0, 1), dim=2), dim=3)


def _fold(weight: Tensor, *, dim: int) -> Tensor:
    before, here, after = weight.split(1, dim)
    return torch.cat([after, here + after, before + here, before], dim)


class FoldedUpsample2D(Upsample2D):
    """An `Upsample2D` that computes upsampling and convolution as one transposed convolution.

    If the output is not exactly twice as large as the input, the layer computes upsampling and
    convolution separately.
    """

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
    """AutoencoderDC's upsampling block, which computes upsampling and convolution as one step.

    With `shortcut`, the block adds the input with repeated channels, after a pixel shuffle.
    """

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
    """Compute every nearest x2 upsampling of `net` and the convolution after it as one step.

    This is called folding. Only the class of the upsampling modules changes. Their names,
    parameters and hooks do not change, and a copy of a folded module is folded too. The convolution
    is no longer called as a module, so hooks of the convolution do not run.

    Returns:
        The number of folded modules.
    """
    found = 0
    for module in net.modules():
        if (folded := _FOLDED.get(type(module))) is not None and _can_fold(module):
            module.__class__ = folded
            found += 1
    return found


def unfold_upsampling(net: nn.Module) -> None:
    """Undo `fold_upsampling`, so that the layers have diffusers' classes again."""
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
    """Return the convolution of an upsampling layer of diffusers, or None if it has none."""
    return getattr(module, "conv", None) or getattr(module, "Conv2d_0", None)
