"""Write a continuous latent to a file: quantise each channel by its own step, then range-code.

    prior = LatentPrior.fit(samples)                      # (d, n): latents of other images
    gains = channel_gains(decode, z)                      # (d,)
    steps = channel_steps(gains, noise_psnr=32.0, f=8)    # (d,)
    content = encode_latent(z[0], prior=prior, steps=steps)
    z_hat = decode_latent(content)                        # from the bytes alone

Each channel of a latent has its own quantiser with a constant step. The quantiser is centred at the
median or mean of the prior (the channel's location). A range coder codes the resulting integers,
called symbols, with a Laplace or Gaussian distribution of the prior's scale (constriction, Bamler
2022, https://arxiv.org/abs/2201.01741). The steps are chosen so that the rounding of each channel
causes the same squared error in the image, as in reverse water-filling (Cover and Thomas 2006,
section 10.3.3). The decoder's Jacobian gives the error in the image.

    file = magic and version (4 bytes) | crc32 (4) | count (1) | varints: d, h, w, smallest step,
           and lowest value and span of six fields of integers | words of the range coder:
           the fields (d integers each), then channel by channel the symbols

A field holds one integer for each channel. The six fields are: step, scale, kind of distribution,
location, lowest symbol, and span (highest minus lowest symbol).

`d` latent channels, `h w` latent positions, `f` downsampling factor, `n` samples. An image has
`H W` = `f * h`, `f * w` pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]  # compiled
from numpy.typing import NDArray
from torch import Tensor

from latentvae.coding.bitstream import Integers, decode_symbols, pack, require, unpack
from latentvae.errors import UserError

LATENT_MAGIC = b"LVZ\x01"  # The last byte is the format's version.
MAX_ELEMENTS = 2**26  # Largest number of elements of one latent: 256 MB in float32.
MAX_CHANNELS = 2**16
MIN_STEP = 1e-30
# A file stores a quantiser step as the smallest step times a power of 2 ** (1 / 16). So the stored
# step is wrong by at most 2.2 percent.
STEP_RESOLUTION = 16
# A file stores a prior's scale as the smallest step times a power of 2 ** (1 / 8). The stored scale
# is wrong by at most 4.4 percent, which costs at most 0.003 bits per symbol.
SCALE_RESOLUTION = 8
OCTAVES = 60  # steps and scales may be up to 2 ** 60 times the smallest step

# Smallest scale of a distribution. A narrower distribution saves no bits for the symbol 0, and
# costs up to 24 bits for every other symbol.
MIN_MODEL_SCALE = (1 / 16, 1 / 8)  # in quantiser steps, for Laplace and Gaussian
FAMILIES = (stream.model.QuantizedLaplace, stream.model.QuantizedGaussian)

# A file stores six integers ("fields") for each channel: step, scale, kind of distribution,
# location, lowest symbol, and highest minus lowest symbol. LIMITS has the lowest and highest value
# of each field. constriction gives each symbol a probability of at least 2**-24.
MAX_SYMBOL = 2**19
LIMITS = (
    (0, STEP_RESOLUTION * OCTAVES + 1),
    (-SCALE_RESOLUTION * OCTAVES, SCALE_RESOLUTION * OCTAVES),
    (0, 1),
    (-(2**22), 2**22),
    (-MAX_SYMBOL, MAX_SYMBOL),
    (0, 2 * MAX_SYMBOL),
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LatentPrior:
    """The distribution of the latents in each of d channels. All tensors have shape (d,).

    Args:
        location: median of a Laplace or mean of a Gaussian distribution, float64.
        scale: mean absolute deviation of a Laplace or standard deviation of a Gaussian, above 0.
        gaussian: True for a Gaussian, False for a Laplace.
    """

    location: Tensor
    scale: Tensor
    gaussian: Tensor

    @classmethod
    def fit(cls, samples: Tensor) -> "LatentPrior":
        """Return the prior that fits samples best, a Laplace or a Gaussian for each channel.

        For each channel, the distribution with the larger likelihood is chosen.

        Args:
            samples: n latent values from several images for each of d channels, (d, n).
        """
        if samples.ndim != 2 or samples.numel() == 0:
            raise ValueError(
                f"samples must be latents of shape (d, n) (got {tuple(samples.shape)})."
            )
        values = samples.detach().cpu().double()
        _require_finite(values)

        # fit both kinds of distributions
        floor = 1e-6 * (values.abs().max().item() or 1.0)  # the scale of a constant channel
        median, mean = values.median(dim=1).values, values.mean(dim=1)
        deviation = (values - median[:, None]).abs().mean(dim=1).clamp_min(floor)
        std = values.std(dim=1, correction=0).clamp_min(floor)

        # The largest log-likelihood per sample is minus the entropy of the fitted density.
        laplace = -(2 * math.e * deviation).log()
        gaussian = -(2 * math.pi * math.e * std.square()).log() / 2 > laplace
        location = torch.where(gaussian, mean, median)
        return cls(location, torch.where(gaussian, std, deviation), gaussian)


def channel_gains(
    decode: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    probes: int = 8,
    seed: int = 0,
    max_side: int = 32,
) -> Tensor:
    """Return the squared image error per squared latent error, for each of d channels, (d,).

    The result is the diagonal of J^T J, averaged over latents and positions, where J is the
    decoder's Jacobian at `z`. The diagonal is estimated with vectors v of random signs, because the
    mean of (J^T v)_i^2 is the sum over outputs j of J_ji^2 (Hutchinson 1989). The result is float64
    on the CPU.

    Args:
        decode: a differentiable decoder, (B, d, h, w) -> (B, 3, H, W) in [-1, 1]. Its weights may
            be frozen.
        z: latents, (B, d, h, w). One latent is enough.
        probes: number of random sign vectors v. Each v needs one backward pass.
        seed: seed of the random signs.
        max_side: longest side of a latent in positions. A larger latent is cropped to its centre.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        total = torch.zeros(z.shape[1], dtype=torch.float64)
        z = _middle(z, max_side).detach().clone().requires_grad_()
        images = decode(z)

        # one backward pass for each vector of random signs
        for _ in range(probes):
            signs = torch.randint(2, images.shape, generator=generator) * 2 - 1
            (pulled,) = torch.autograd.grad(images, z, signs.to(images), retain_graph=True)
            total += pulled.cpu().double().square().mean(dim=(0, 2, 3))
    return total / probes


def channel_steps(gains: Tensor, *, noise_psnr: float, f: int) -> Tensor:
    """Return a quantiser step for each of d channels, given the PSNR of the rounding error.

    A step D causes a mean squared error of D^2 / 12 per latent element. A latent position stands
    for 3 f^2 values of an RGB image. With gain g_c and step D_c of channel c, the mean squared
    error of the RGB values is sum_c g_c D_c^2 / 12 / (3 f^2). For a given error, the file has the
    fewest bits if gain times squared step (g_c D_c^2) is the same in every channel. All these
    formulas hold for small steps (high-rate theory). If a step is large compared with the values of
    its channel, the error is smaller than the formula says, so the PSNR is higher than
    `noise_psnr`. The result has shape (d,) and dtype float64.

    Args:
        gains: the result of `channel_gains`, (d,). A channel of gain 0 gets an infinite step.
        noise_psnr: PSNR of the image error that rounding causes, in dB, with peak 2 (images in
            [-1, 1]).
        f: downsampling factor. A latent position stands for f x f pixels.
    """
    gains = gains.detach().cpu().double()
    if not (gains.isfinite() & (gains >= 0)).all():
        raise ValueError(f"gains must be finite and at least 0 (got {gains.tolist()}).")
    mse = 4 / 10 ** (noise_psnr / 10)
    share = 36 * f**2 * mse / max(1, int(gains.count_nonzero()))  # g_c D_c^2
    return (share / gains).sqrt()


def encode_latent(z: Tensor, *, prior: LatentPrior, steps: Tensor) -> bytes:
    """Return one image's latent as the bytes of a complete file (header and range-coded latent).

    Args:
        z: the latent of d channels, (d, h, w).
        prior: a prior that was fitted on other images. With a prior fitted on this image, the
            number of bits would be too low for a fair measurement.
        steps: quantiser step of each channel, (d,), at least 1e-30. If the step is infinite, every
            value of the channel is decoded as the location of the prior.

    Raises:
        ValueError: the latents are not finite, or the shapes or quantisation steps are wrong.
        UserError: the latent is too large, or a step is so small that symbols exceed 2**19 or the
            integer that stores a location exceeds 2**22.
    """
    _check_latent(z, prior, steps)

    # symbols
    grid = _Grid.of(prior, steps.detach().cpu().double().numpy())
    symbols = grid.quantize(z.detach().flatten(1).cpu().double().numpy())
    lows = symbols.min(axis=1)
    fields = [*grid.fields, lows, symbols.max(axis=1) - lows]

    # header: shape and smallest step. The range coder codes the integer fields of all channels
    numbers = [*z.shape, int(np.float32(grid.base).view(np.uint32))]
    coder = stream.queue.RangeEncoder()
    for field, limits in zip(fields, LIMITS, strict=True):
        low, span = int(field.min()), int(field.max() - field.min())
        assert limits[0] <= low and low + span <= limits[1], (limits, low, span)
        numbers += [low - limits[0], span]
        _encode(coder, field - low, _uniform(span))

    # channel by channel, the symbols
    for values, model in zip(symbols, grid.models(*fields[-2:]), strict=True):
        _encode(coder, values, model)
    return pack(LATENT_MAGIC, numbers, coder)


def decode_latent(content: bytes) -> Tensor:
    """Return the quantised latent (d, h, w), float32, from a file that `encode_latent` wrote.

    Raises:
        UserError: the bytes are damaged, incomplete or another kind of file.
    """
    # header
    numbers, coder = unpack(LATENT_MAGIC, content)
    require(len(numbers) == 4 + 2 * len(LIMITS))
    d, h, w, base_bits = numbers[:4]
    require(0 < d <= MAX_CHANNELS and 0 < d * h * w <= MAX_ELEMENTS and base_bits < 2**32)
    base = float(np.uint32(base_bits).view(np.float32))
    require(0 < base < math.inf)

    # the integer fields of all channels
    fields = []
    for limits, low, span in zip(LIMITS, numbers[4::2], numbers[5::2], strict=True):
        require(limits[0] + low + span <= limits[1])
        fields.append(_decode(coder, d, _uniform(span)) + limits[0] + low)
    grid = _Grid(base, fields[0], fields[1], fields[2], fields[3])

    # symbols
    symbols = np.empty((d, h * w), np.int64)
    for values, model in zip(symbols, grid.models(*fields[-2:]), strict=True):
        values[:] = _decode(coder, h * w, model)
    require(coder.maybe_exhausted())

    # A channel whose symbols are all equal has no model. All its symbols are the lowest symbol.
    z = grid.dequantize(np.where(fields[5][:, None] == 0, fields[4][:, None], symbols))
    require(bool((np.abs(z) <= np.finfo(np.float32).max).all()))
    return torch.from_numpy(z.astype(np.float32)).view(d, h, w)


def _check_latent(z: Tensor, prior: LatentPrior, steps: Tensor) -> None:
    if z.ndim != 3 or z.numel() == 0 or not len(z) == len(steps) == len(prior.scale):
        shapes = f"{tuple(z.shape)}, {tuple(steps.shape)} and {tuple(prior.scale.shape)}"
        raise ValueError(
            f"latent, steps and prior must be (d, h, w), (d,) and (d,) (got {shapes})."
        )
    if z.numel() > MAX_ELEMENTS or len(z) > MAX_CHANNELS:
        raise UserError(
            f"a latent may have at most {MAX_ELEMENTS} elements and {MAX_CHANNELS} channels "
            f"(got {z.numel()} and {len(z)}). Encode the image in parts."
        )
    _require_finite(z)


@dataclass(frozen=True, eq=False)
class _Grid:
    """Quantiser and entropy model of each of d channels, from integers (d,) that a file holds.

    All floats are computed from the integers in the file, so encoder and decoder compute with the
    same floats.
    """

    base: float  # the smallest finite step, a float32
    steps: Integers  # 0 for an infinite step, else 1 + 16 log2(step / base)
    scales: Integers  # 8 log2(scale / base)
    families: Integers  # 0 Laplace, 1 Gaussian
    locations: Integers  # in units of `unit`

    @classmethod
    def of(cls, prior: LatentPrior, steps: Floats) -> "_Grid":
        """Return quantisers and entropy models with `prior` and `steps` rounded as in a file."""
        if not (steps >= MIN_STEP).all():
            raise ValueError(f"steps must be at least {MIN_STEP:g} (got {steps.tolist()}).")
        finite = np.isfinite(steps)
        base = float(np.float32(min(steps[finite].min(initial=1e30), 1e30)))
        if not finite.any():
            base = 1.0

        # integers for steps and scales, on logarithmic scales
        octaves = np.log2(np.where(finite, steps, base) / base).clip(0, OCTAVES)
        step_codes = np.where(finite, 1 + np.rint(STEP_RESOLUTION * octaves), 0)
        octaves = np.log2(prior.scale.numpy() / base).clip(-OCTAVES, OCTAVES)
        scale_codes, families = np.rint(SCALE_RESOLUTION * octaves), prior.gaussian.numpy()
        step, scale, family = (x.astype(np.int64) for x in (step_codes, scale_codes, families))

        # integers for locations, in a unit that is computed from the integers for steps and scales
        grid = cls(base, step, scale, family, np.zeros_like(step))
        locations = np.rint(prior.location.numpy() / grid.unit)
        _require_coarse(locations, LIMITS[3][1])
        return replace(grid, locations=locations.astype(np.int64))

    @property
    def fields(self) -> list[Integers]:
        return [self.steps, self.scales, self.families, self.locations]

    @property
    def step(self) -> Floats:
        """Quantiser step of each channel, (d,), with 0 in place of an infinite step.

        All symbols of a channel with an infinite step are 0, so the channel is decoded to the same
        values with any finite step.
        """
        finite = self.base * np.exp2((self.steps - 1) / STEP_RESOLUTION)
        return np.where(self.steps > 0, finite, 0.0)

    @property
    def scale(self) -> Floats:
        return self.base * np.exp2(self.scales / SCALE_RESOLUTION)

    @property
    def unit(self) -> Floats:
        """Unit in which the location of each channel is stored, (d,).

        The unit is the larger of 1/8 of the prior's scale and 1/128 of the quantiser's step. An
        infinite step counts here as the smallest finite step.
        """
        return np.maximum(self.scale, np.maximum(self.step, self.base) / 16) / 8

    @property
    def location(self) -> Floats:
        return self.locations * self.unit

    def quantize(self, values: Floats) -> Integers:
        """Return the symbols (the quantiser's integers) of n latent values per channel, (d, n)."""
        step = np.where(self.steps > 0, self.step, np.inf)
        symbols = np.rint((values - self.location[:, None]) / step[:, None])
        _require_coarse(symbols, MAX_SYMBOL)
        return symbols.astype(np.int64)

    def dequantize(self, symbols: Integers) -> Floats:
        return symbols * self.step[:, None] + self.location[:, None]

    def models(self, lows: Integers, spans: Integers) -> list[Any | None]:
        """Return for each channel the distribution of its symbols, or None if they are all equal.

        Args:
            lows: lowest symbol of each channel, (d,).
            spans: highest minus lowest symbol of each channel, (d,).
        """
        result: list[Any | None] = []
        scales = self.scale / np.where(self.steps > 0, self.step, np.inf)
        for low, span, family, scale in zip(lows, spans, self.families, scales, strict=True):
            width = max(float(scale), MIN_MODEL_SCALE[family])
            ends = int(low), int(low + span)
            result.append(FAMILIES[family](*ends, 0.0, width) if span else None)
        return result


def _encode(coder: Any, values: Integers, model: Any | None) -> None:
    if model is not None:
        coder.encode(values.astype(np.int32), model)


def _decode(coder: Any, count: int, model: Any | None) -> Integers:
    if model is None:
        return np.zeros(count, np.int64)
    return decode_symbols(coder, model, count)


def _uniform(span: int) -> Any | None:
    return stream.model.Uniform(span + 1) if span else None


def _middle(z: Tensor, max_side: int) -> Tensor:
    for dim in (2, 3):
        side = min(z.shape[dim], max_side)
        z = z.narrow(dim, (z.shape[dim] - side) // 2, side)
    return z


def _require_finite(z: Tensor) -> None:
    if not z.isfinite().all():
        raise ValueError("the latent has values that are not finite, so it cannot be encoded.")


def _require_coarse(codes: Floats, limit: int) -> None:
    """Raise UserError if a channel's step is so small that one of its `codes` exceeds `limit`."""
    peaks = np.abs(codes).reshape(len(codes), -1).max(axis=1)
    if peaks.max() > limit:
        channel = int(peaks.argmax())
        raise UserError(
            f"the step of channel {channel} is too fine: a value has the code "
            f"{peaks[channel]:.3g}, but a file holds codes up to {limit}. Use coarser steps (a "
            "lower noise_psnr)."
        )
