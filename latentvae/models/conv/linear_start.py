"""Initialise a convolutional autoencoder so that it computes a linear code, the PCA of patches.

The outputs of residual branches and attention are zero at the start. The linear code is computed by
the first convolution, the strided and upsampling convolutions, the 1x1 shortcuts and the last
convolution:

- Encoder: each strided convolution joins 2 x 2 positions and keeps their principal components. The
  output of the last strided convolution is the linear code: the principal components of patches of
  f x f pixels (`LinearCode`).
- Decoder: each upsampling convolution halves the side of the patches. The convolution predicts the
  principal components of the smaller patches, by least squares on images. The last upsampling
  convolution predicts pixels.
- The last GroupNorm and SiLU of encoder and decoder must not change a number x of the linear code.
  So each number x is stored in two channels, as x and -x, because silu(x) - silu(-x) = x. Constant
  channels in the same GroupNorm group keep the group's statistics almost the same for all images.

Most channels that the linear code does not need keep their random initial weights.

`B` batch, `C` image channels, `H W` pixels, `f` downsampling factor, `d` latent channels, `h w`
latent positions, `n` principal components, `L` number of strided convolutions, so f = 2 ** L.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from einops import einsum, rearrange
from torch import Tensor, nn

from latentvae.errors import UserError
from latentvae.linear_code import LinearCode, PatchMoments
from latentvae.models.conv.conv_config import norm_capacity

# Before the last GroupNorm, the numbers of the linear code are multiplied by ENCODER_SCALE or
# DECODER_SCALE. The constant channels have the larger value CONSTANT, so that the statistics of the
# GroupNorm hardly depend on the image.
ENCODER_SCALE, DECODER_SCALE, CONSTANT = 0.3, 0.3, 3.0

# Settings of the least squares fits: the ridge penalty relative to the features' mean square, the
# largest number of feature channels, and about the number of positions in all images together.
RIDGE, MAX_FEATURES, MAX_ROWS = 1e-4, 128, 2**16

# Whitening gives variance 1 only to components whose variance is above this share of the first.
LEAST_VARIANCE = 1e-6
CHUNK = 16  # images at a time


def patch_codes(images: Tensor, *, levels: int) -> list[LinearCode]:
    """Return a linear code for each patch side of 1, 2, 4, ..., 2 ** levels pixels.

    A linear code is a set of principal components of patches. The returned codes have all principal
    components. The code of a single pixel is the pixel itself.

    Args:
        images: N images (N, C, H, W). H and W are multiples of 2 ** levels.
        levels: number of strided convolutions.
    """
    channels, codes = images.shape[1], []
    for level in range(levels + 1):
        moments = PatchMoments(2**level)
        for part in images.split(CHUNK):
            moments.update(part)
        codes.append(moments.linear_code(channels * 4**level))

    # A pixel is its own code.
    pixels = torch.eye(channels).reshape(channels, channels, 1, 1)
    codes[0] = LinearCode(torch.zeros(channels, 1, 1), pixels, torch.ones(channels))
    return codes


@torch.no_grad()
def start_encoder(net: Any, codes: Sequence[LinearCode], *, d: int, whiten: bool) -> None:
    """Set the encoder's weights to compute the linear code with up to `d` numbers per patch.

    There are fewer than `d` numbers if the network is too narrow, or if a patch has fewer pixel
    values. Latent channels without a number are 0. If the network has a posterior, its initial
    log-variance does not depend on the image.

    Args:
        net: a network with diffusers' `Encoder`, and with or without `quant_conv`.
        codes: the result of `patch_codes`.
        d: number of latent channels.
        whiten: give each latent channel the variance 1. Without `whiten`, all latent channels have
            the same scale factor, which gives the first channel the variance 1. With this common
            factor, the squared error of the latent is proportional to that of the pixels.

    Raises:
        UserError: the network has too few channels.
    """
    encoder = net.encoder
    _zero_branches(encoder)
    _clear_rows(encoder.conv_in, codes[0].basis.shape[0])
    for channel in range(codes[0].basis.shape[0]):
        encoder.conv_in.weight[channel, channel, 1, 1] = 1.0

    # the layer before the last norm outputs each number x as two channels, x and -x
    blocks = list(encoder.down_blocks)
    shortcut = blocks[-1].resnets[0].conv_shortcut
    joins = [block.downsamplers[0].conv for block in blocks[:-1]]
    kept = codes[0].basis.shape[0]
    narrowest = min(len(conv.weight) for conv in joins)
    fitting = min(narrowest, len(encoder.conv_out.weight), len(codes[-1].basis))
    count_d = min(d, fitting, _capacity(encoder.conv_norm_out))
    layout = _Layout(encoder.conv_norm_out, count=count_d)
    variances = codes[-1].variances[:count_d]
    scales = variances.clamp_min(LEAST_VARIANCE * variances[0]).rsqrt()
    scales = scales if whiten else scales[:1].expand(count_d)

    # strided convolutions, and the shortcuts between them
    for level, (join, code) in enumerate(zip(joins, codes[1:], strict=True)):
        final = level == len(joins) - 1 and shortcut is None
        count = count_d if final else min(len(code.basis), join.weight.shape[0])
        weight, bias = _joining(codes[level], code, kept=kept, count=count)
        if final:
            layout.fill(join, weight * scales[:, None, None, None], bias * scales, ENCODER_SCALE)
        else:
            _set_rows(join, weight, bias)
            kept = count
            following = blocks[level + 1].resnets[0].conv_shortcut
            if following is not None and following is not shortcut:
                kept = min(kept, following.weight.shape[0])
                _set_rows(following, torch.eye(kept)[:, :, None, None], torch.zeros(kept))
    if shortcut is not None:
        weight = torch.eye(count_d, kept)[:, :, None, None] * scales[:, None, None, None]
        layout.fill(shortcut, weight, torch.zeros(count_d), ENCODER_SCALE)

    # the norm passes the numbers of the code on, and the last layers read them
    layout.pass_through(variances * scales.square(), ENCODER_SCALE)
    quant_conv = getattr(net, "quant_conv", None)
    last = encoder.conv_out if quant_conv is None else quant_conv
    logvar = last.bias[d:].clone()  # the initial log-variance of a posterior
    layout.read(encoder.conv_out, ENCODER_SCALE)
    if quant_conv is not None:
        _clear_rows(quant_conv, len(quant_conv.weight))
        _set_identity(quant_conv, count_d)
    last.bias[d:] = logvar


@torch.no_grad()
def start_decoder(net: Any, codes: Sequence[LinearCode], z: Tensor, images: Tensor) -> None:
    """Set the decoder's weights so that it predicts the images linearly, by least squares.

    Args:
        net: a network with diffusers' `Decoder`, and with or without `post_quant_conv`.
        codes: the result of `patch_codes`.
        z: latents of the images (samples of the posterior, or codes), (N, d, h, w).
        images: (N, C, H, W).

    Raises:
        UserError: the network has too few channels.
    """
    decoder, post_quant_conv = net.decoder, getattr(net, "post_quant_conv", None)
    _zero_branches(decoder)
    if post_quant_conv is not None:
        count = min(post_quant_conv.weight.shape[:2])
        _clear_rows(post_quant_conv, len(post_quant_conv.weight))
        _set_identity(post_quant_conv, count)
        z = z[:, :count]

    # the first convolution keeps the principal components of neighbourhoods
    features = _neighbourhoods(decoder.conv_in, z)

    # upsampling convolutions predict patches half as large
    blocks = list(decoder.up_blocks)
    shortcut = blocks[-1].resnets[0].conv_shortcut
    layout = _Layout(decoder.conv_norm_out, count=images.shape[1])
    for level, block in enumerate(blocks[:-1]):
        features = _through_shortcut(block, features)
        conv, code = block.upsamplers[0].conv, codes[len(codes) - 2 - level]
        final = level == len(blocks) - 2
        count = min(len(code.basis), len(conv.weight), MAX_FEATURES)
        code = LinearCode(code.mean, code.basis[:count], code.variances[:count])
        weight, bias = _least_squares(features, code, images)
        if not final:  # spare channels pass the features on, so that later layers can use them
            spare = min(len(conv.weight), MAX_FEATURES) - count
            kept = features.shape[1]
            passing = torch.zeros(min(spare, kept), kept, 3, 3)
            passing[:, :, 1, 1] = torch.eye(*passing.shape[:2])
            weight = torch.cat([weight, passing])
            bias = torch.cat([bias, torch.zeros(len(passing))])
        if final and shortcut is None:
            layout.fill(conv, weight, bias, DECODER_SCALE)
        else:
            _set_rows(conv, weight, bias)
        if not final:
            features = _apply(_upsampled(features), weight, bias)
    if shortcut is not None:
        count = images.shape[1]
        layout.fill(shortcut, torch.eye(count)[:, :, None, None], torch.zeros(count), DECODER_SCALE)

    variances = images.movedim(1, 0).flatten(1).square().mean(1)
    layout.pass_through(variances, DECODER_SCALE)
    layout.read(decoder.conv_out, DECODER_SCALE)


class _Layout:
    """Choice of the channels that store the numbers of a linear code before a GroupNorm and SiLU.

    Each number x is stored in two channels, as x and -x, because silu(x) - silu(-x) = x. A group
    with such pairs also has at least two constant channels of opposite sign, which make the group's
    statistics almost independent of the image.

    Args:
        norm: the GroupNorm.
        count: how many numbers of the code pass through the GroupNorm.

    Raises:
        UserError: the norm has too few channels.
    """

    def __init__(self, norm: nn.GroupNorm, *, count: int) -> None:
        self.norm = norm
        if count > _capacity(norm) or count == 0:
            raise _too_narrow(count)
        size = norm.num_channels // norm.num_groups
        per_group = (size - 2) // 2
        self.groups: list[tuple[list[tuple[int, int]], list[int]]] = []
        for start in range(0, count, per_group):
            pairs = min(per_group, count - start)
            first = len(self.groups) * size
            channels = list(range(first, first + size))
            self.groups.append(
                (
                    [(channels[2 * i], channels[2 * i + 1]) for i in range(pairs)],
                    channels[2 * pairs : 2 * pairs + (size - 2 * pairs) // 2 * 2],
                )
            )

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [pair for pairs, _ in self.groups for pair in pairs]

    def fill(self, conv: Any, weight: Tensor, bias: Tensor, scale: float) -> None:
        """Set the weights of `conv` so that it outputs x and -x for each number x of a code.

        `conv` also outputs the constant channels of each group.

        Args:
            conv: the convolution before the GroupNorm.
            weight, bias: weight and bias with which a convolution would output the numbers x.
            scale: factor by which each x is multiplied.
        """
        size = self.norm.num_channels // self.norm.num_groups
        _clear_rows(conv, len(self.groups) * size)
        for (plus, minus), row, offset in zip(self.pairs, weight, bias, strict=True):
            for channel, sign in ((plus, scale), (minus, -scale)):
                _write(conv, channel, row * sign)
                conv.bias[channel] = offset * sign
        for _, constants in self.groups:
            for i, channel in enumerate(constants):
                conv.bias[channel] = CONSTANT if i % 2 == 0 else -CONSTANT

    def pass_through(self, variances: Tensor, scale: float) -> None:
        """Set the GroupNorm's weights so that it does not change the numbers of the code.

        Args:
            variances: mean square of each number of the code, before the multiplication by `scale`.
            scale: factor by which the numbers are multiplied before the GroupNorm.
        """
        size = self.norm.num_channels // self.norm.num_groups
        first = 0
        for number, (pairs, constants) in enumerate(self.groups):
            squares = 2 * scale**2 * variances[first : first + len(pairs)].sum()
            mean = (squares + len(constants) * CONSTANT**2) / size + self.norm.eps
            channels = slice(number * size, (number + 1) * size)
            self.norm.weight[channels] = mean.sqrt()
            self.norm.bias[channels] = 0.0
            first += len(pairs)

    def read(self, conv: Any, scale: float) -> None:
        """Set the convolution after the norm so that its first channels are the code's numbers.

        All further output channels of this convolution are 0. `scale` is the factor by which the
        numbers were multiplied before the GroupNorm.
        """
        _clear_rows(conv, len(conv.weight))
        for number, (plus, minus) in enumerate(self.pairs):
            conv.weight[number, plus, 1, 1] = 1 / scale
            conv.weight[number, minus, 1, 1] = -1 / scale


def _capacity(norm: nn.GroupNorm) -> int:
    return norm_capacity(norm.num_channels, norm.num_groups)


def _zero_branches(module: nn.Module) -> None:
    """Set the residual branch of every residual block and attention layer to 0."""
    for part in module.modules():
        last: Any = None
        if isinstance(part, ResnetBlock2D):
            last = part.conv2
        elif isinstance(part, Attention):
            outputs: Any = part.to_out
            last = outputs[0]
        if last is not None:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


def _joining(
    small: LinearCode, large: LinearCode, *, kept: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution that turns the codes of 2 x 2 patches into one code.

    The weight is (count, kept, 2, 2). The resulting code describes the large patch that the 2 x 2
    small patches form. A small patch is approximated by the mean small patch plus its code times
    the basis.

    Args:
        small, large: linear codes of the small and of the large patches.
        kept: number of values in the code of a small patch.
        count: number of values in the resulting code.
    """
    basis = small.basis[:kept]
    parts = rearrange(large.basis[:count], "n c (a y) (b x) -> n a b c y x", a=2, b=2)
    weight = einsum(parts, basis, "n a b c y x, k c y x -> n k a b")
    offset = small.mean.repeat(1, 2, 2) - large.mean
    return weight, einsum(large.basis[:count], offset, "n c y x, c y x -> n")


def _neighbourhoods(conv: Any, z: Tensor) -> Tensor:
    """Set the weights of the decoder's first convolution, and return its output (N, n, h, w).

    The n output channels are principal components of 3 x 3 latent positions, for N latents `z`.
    """
    d = z.shape[1]
    count = min(9 * d, len(conv.weight), MAX_FEATURES)
    rows = torch.cat(
        [rearrange(F.unfold(p, 3, padding=1), "b k l -> (b l) k") for p in z.split(64)]
    )
    _, vectors = torch.linalg.eigh(rows.double().T @ rows.double())
    weight = vectors.T.flip(0)[:count].float().reshape(count, d, 3, 3)
    _set_rows(conv, weight, torch.zeros(count))
    return _apply(z, weight, torch.zeros(count))


def _through_shortcut(block: Any, features: Tensor) -> Tensor:
    """Set a block's first 1x1 shortcut to the identity, and return the shortcut's output."""
    shortcut = block.resnets[0].conv_shortcut
    if shortcut is None:
        return features
    kept = min(features.shape[1], len(shortcut.weight))
    _set_rows(shortcut, torch.eye(kept, features.shape[1])[:, :, None, None], torch.zeros(kept))
    return features[:, :kept]


def _least_squares(features: Tensor, code: LinearCode, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the 3 x 3 convolution that best predicts a code from features.

    The fit uses only the positions in one window of each image, at a random position.

    Args:
        features: features of N images with c channels, (N, c, h, w). This function upsamples them
            to (N, c, 2 h, 2 w).
        code: linear code of n principal components. A patch of this code is as large as one
            position of the upsampled features. The returned weight is (n, c, 3, 3).
        images: (N, C, H, W).
    """
    size = features.shape[1] * 9 + 1
    gram = torch.zeros(size, size, dtype=torch.float64)
    product = torch.zeros(size, len(code.basis), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    for part, pictures in zip(features.split(CHUNK), images.split(CHUNK), strict=True):
        window, at = _window(part, total=len(features), generator=generator)
        found = F.unfold(_upsampled(part[:, :, window[0], window[1]]), 3, padding=1)
        found = rearrange(found, "b k (y x) -> b y x k", y=2 * part[0, 0, window[0], 0].numel())
        rows = rearrange(found[:, at[0], at[1]], "b y x k -> (b y x) k")
        rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)

        # the codes of the same positions
        step = 2 * code.f  # pixels of one position of the features
        pixels = [slice(part.start * step, part.stop * step) for part in window]
        target = code.encode(pictures[:, :, pixels[0], pixels[1]])[:, :, at[0], at[1]]
        gram += (rows.T @ rows).double()
        product += (rows.T @ rearrange(target, "b n y x -> (b y x) n")).double()

    gram.diagonal()[:-1].add_(RIDGE * gram.diagonal()[:-1].mean())
    solution = torch.linalg.solve(gram, product).float()  # (9 c + 1, n)
    weight = rearrange(solution[:-1], "(c y x) n -> n c y x", y=3, x=3)
    return weight.contiguous(), solution[-1]


def _window(
    features: Tensor, *, total: int, generator: torch.Generator
) -> tuple[list[slice], list[slice]]:
    """Return the slices (rows, columns) of a random window and of its inner part.

    The inner part has the upsampled positions whose 3 x 3 neighbours all lie in the window. Where
    the window touches the border of the image, the inner part also reaches this border.

    Args:
        features: features of some of the images, (B, c, h, w).
        total: number of all images. The windows of all images together have about `MAX_ROWS`
            upsampled positions.
        generator: random generator that draws the position of the window.
    """
    side = max(4, math.ceil(math.sqrt(MAX_ROWS / (4 * total))))
    window, inside = [], []
    for length in features.shape[2:]:
        own = min(side, length)
        start = int(torch.randint(length - own + 1, (1,), generator=generator))
        window.append(slice(start, start + own))
        inside.append(slice(int(start > 0), 2 * own - int(start + own < length)))
    return window, inside


def _upsampled(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2, mode="nearest")


def _apply(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([F.conv2d(part, weight, bias, padding=1) for part in features.split(CHUNK)])


def _set_rows(conv: Any, weight: Tensor, bias: Tensor) -> None:
    """Replace weights and biases of a convolution's first output channels.

    If the kernel of `weight` is smaller than the convolution's kernel, `weight` is written into the
    top left corner of the larger kernel, and the rest of the larger kernel is set to 0.
    """
    _clear_rows(conv, len(weight))
    for row, values in enumerate(weight):
        _write(conv, row, values)
    conv.bias[: len(bias)] = bias


def _clear_rows(conv: Any, count: int) -> None:
    conv.weight[:count] = 0.0
    conv.bias[:count] = 0.0


def _write(conv: Any, row: int, values: Tensor) -> None:
    inputs, height, width = values.shape
    conv.weight[row, :inputs, :height, :width] = values


def _set_identity(conv: Any, count: int) -> None:
    """Set the diagonal of a 1x1 convolution to 1 for the first `count` channels."""
    for channel in range(count):
        conv.weight[channel, channel] = 1.0


def _too_narrow(count: int) -> UserError:
    return UserError(
        "init linear needs at least 4 channels for each group of the network's last GroupNorm, and "
        f"enough channels to pass {count} values through this GroupNorm. Give a smaller "
        "norm_num_groups, or --init random."
    )
