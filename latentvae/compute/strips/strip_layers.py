"""Compute diffusers' blocks strip by strip (several rows at a time) on large feature maps.

If a feature map is in a file, only strips of the map are in memory. A 3 x 3 convolution needs one
row above and one row below its strip. A group norm needs the statistics of the whole map, which are
summed while the map is written. So a residual block with input map x and inner map h has two
passes:

    norm1 -> activation -> conv1 -> h       reads x
    norm2 -> activation -> conv2, + x       reads h and x, writes over x (over h if channels differ)

At most two maps, x and h, exist at the same time.

`C` channels, `H W` height and width, `N` positions, `n` positions of a strip.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from latentvae.compute.strips.maps import FeatureMap, Workspace
from latentvae.compute.upsampling import fold_kernel

Prepare = Callable[[Tensor], Tensor]


def normalizer(norm: nn.GroupNorm, x: FeatureMap, activation: nn.Module | None = None) -> Prepare:
    """Return a function that applies a group norm and an activation to strips of `x`.

    The norm uses the statistics that the whole map `x` has when `normalizer` is called.
    """
    groups = x.statistics.pooled(norm.num_groups)
    mean, variance = groups.mean, groups.variance(correction=0)
    size = x.channels // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(size)
    shift = -mean.repeat_interleave(size) * scale
    if norm.affine:
        weight, bias = (value.detach().cpu().double() for value in (norm.weight, norm.bias))
        scale, shift = scale * weight, shift * weight + bias

    def prepare(strip: Tensor) -> Tensor:
        exact = strip.dtype if strip.dtype == torch.float64 else torch.float32
        factor, offset = (
            value.to(strip.device, exact).view(1, -1, 1, 1) for value in (scale, shift)
        )
        values = torch.addcmul(offset, strip.to(exact), factor).to(strip.dtype)
        if isinstance(activation, nn.SiLU):
            return F.silu(values, inplace=True)
        return values if activation is None else activation(values)

    return prepare


def convolved(
    x: FeatureMap, conv: Any, space: Workspace, *, prepare: Prepare | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield the 3 x 3 convolution of `x` as pairs (number of the first row of a strip, strip).

    The function `prepare`, such as a norm and an activation, is applied to strips of `x` before the
    convolution.
    """
    for top, bottom in space.slices(x.height, max(x.channels, conv.out_channels) * x.width):
        strip = _with_halo(x, top, bottom, prepare)
        yield top, F.conv2d(strip, conv.weight, conv.bias, padding=(0, 1))


def _with_halo(x: FeatureMap, top: int, bottom: int, prepare: Prepare | None = None) -> Tensor:
    """Return rows `top - 1` to `bottom` of a map. Rows outside of the map are 0."""
    strip = x.read(max(top - 1, 0), min(bottom + 1, x.height))
    if prepare is not None:
        strip = prepare(strip)
    above, below = int(top == 0), int(bottom == x.height)
    return F.pad(strip, (0, 0, above, below)) if above or below else strip


def resnet(block: Any, x: FeatureMap, space: Workspace) -> FeatureMap:
    """Return the output of a `ResnetBlock2D`. Without a `conv_shortcut`, `x` is overwritten."""
    h = space.make(block.conv1.out_channels, x.height, x.width)
    first = normalizer(block.norm1, x, block.nonlinearity)
    h.fill(convolved(x, block.conv1, space, prepare=first))
    second = normalizer(block.norm2, h, block.nonlinearity)
    strips = convolved(h, block.conv2, space, prepare=second)
    target = x if block.conv_shortcut is None else h
    target.fill(_with_residual(strips, x, block))
    return target


def _with_residual(
    strips: Iterator[tuple[int, Tensor]], x: FeatureMap, block: Any
) -> Iterator[tuple[int, Tensor]]:
    for top, strip in strips:
        residual = x.read(top, top + strip.shape[2])
        if (shortcut := block.conv_shortcut) is not None:
            residual = F.conv2d(residual, shortcut.weight, shortcut.bias)
        strip += residual
        yield top, strip.div_(block.output_scale_factor)


def downsample(block: Any, x: FeatureMap, space: Workspace) -> FeatureMap:
    """Return the output of a `Downsample2D` of stride 2.

    The input is padded with a row of zeros at the bottom and a column of zeros at the right.
    """
    conv = block.conv
    y = space.make(conv.out_channels, (x.height - 2) // 2 + 1, (x.width - 2) // 2 + 1)
    y.fill(_strided(x, y, conv, space))
    return y


def _strided(
    x: FeatureMap, y: FeatureMap, conv: Any, space: Workspace
) -> Iterator[tuple[int, Tensor]]:
    for top, bottom in space.slices(y.height, 2 * x.channels * x.width):
        end = min(2 * bottom + 1, x.height)
        strip = F.pad(x.read(2 * top, end), (0, 1, 0, 2 * bottom + 1 - end))
        yield top, F.conv2d(strip, conv.weight, conv.bias, stride=2)


def upsample(block: Any, x: FeatureMap, space: Workspace) -> FeatureMap:
    """Return the output of an `Upsample2D` (nearest x2, 3 x 3 convolution).

    Upsampling and convolution are computed together as one transposed convolution.
    """
    y = space.make(block.conv.out_channels, 2 * x.height, 2 * x.width)
    y.fill(_doubled(x, block.conv, space))
    return y


def _doubled(x: FeatureMap, conv: Any, space: Workspace) -> Iterator[tuple[int, Tensor]]:
    kernel = fold_kernel(conv.weight)
    for top, bottom in space.slices(x.height, 4 * conv.out_channels * x.width):
        strip = _with_halo(x, top, bottom)
        # The padding of rows is 3: 1 as in `upsample_conv`, and 2 to leave out the two output rows
        # of each extra input row.
        yield 2 * top, F.conv_transpose2d(strip, kernel, conv.bias, stride=2, padding=(3, 1))


def attend(block: Any, x: FeatureMap, space: Workspace) -> FeatureMap:
    """Compute self-attention over all positions in place, for one strip of queries at a time."""
    prepare = normalizer(block.group_norm, x)
    keys, values = _keys_and_values(block, x, prepare, space)
    x.fill(_attended(block, x, prepare, keys, values, space))
    return x


def _keys_and_values(
    block: Any, x: FeatureMap, prepare: Prepare, space: Workspace
) -> tuple[Tensor, Tensor]:
    """Return keys and values of all N positions, each (1, heads, N, C / heads)."""
    keys: Any = None
    values: Any = None
    for top, bottom in space.slices(x.height, x.channels * x.width):
        tokens = _tokens(prepare(x.read(top, bottom)))
        k, v = block.to_k(tokens), block.to_v(tokens)
        if keys is None:
            keys, values = (part.new_empty(x.height * x.width, part.shape[1]) for part in (k, v))
        keys[top * x.width : bottom * x.width] = k
        values[top * x.width : bottom * x.width] = v
    return _heads(keys, block), _heads(values, block)


def _attended(
    block: Any, x: FeatureMap, prepare: Prepare, keys: Tensor, values: Tensor, space: Workspace
) -> Iterator[tuple[int, Tensor]]:
    # Choose strips for which all attention scores fit into memory, because some kernels keep them.
    scores = x.width * block.heads * keys.shape[2]  # for one row of queries
    for top, bottom in space.slices(x.height, max(scores, x.channels * x.width)):
        strip = x.read(top, bottom)
        queries = _heads(block.to_q(_tokens(prepare(strip))), block)
        mixed = F.scaled_dot_product_attention(queries, keys, values)  # (1, heads, n, C / heads)
        mixed = block.to_out[0](rearrange(mixed, "1 heads n c -> n (heads c)"))
        result = rearrange(mixed, "(h w) c -> 1 c h w", w=x.width)
        if block.residual_connection:
            result = result + strip
        yield top, result / block.rescale_output_factor


def _tokens(strip: Tensor) -> Tensor:
    """Return the n positions of a strip (1, C, rows, W) as tokens (n, C)."""
    return rearrange(strip, "1 c h w -> (h w) c")


def _heads(tokens: Tensor, block: Any) -> Tensor:
    """Return n tokens, (n, C), divided among attention heads, as (1, heads, n, C / heads)."""
    return rearrange(tokens, "n (heads c) -> 1 heads n c", heads=block.heads)
