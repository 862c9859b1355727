"""Measure statistics of latents: moments, information, dead and redundant channels, scale.

Sums are in float64. The sums of different batches are combined by the pairwise rules of Chan et al.
(1979) and Pebay (2008, https://doi.org/10.2172/1028931). Active units are defined as in Burda et
al. 2016 (https://arxiv.org/abs/1509.00519, section 5.4). In this module, a unit is a latent channel
over all images and positions. A channel is dead if it carries almost no information for the
decoder.

`B` batch, `d` latent channels, `h w` height and width of a latent.
"""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from latentvae.moments import RunningMoments

# A channel is active if the variance of its posterior mean is above this value (Burda et al. 2016).
ACTIVE_VARIANCE = 0.01
# A channel is dead if (variance of the posterior mean) / (mean posterior variance) is at most this
# value.
DEAD_SIGNAL_TO_NOISE = 0.01
# Without a posterior, a channel is dead if (its std) / (median std of all channels) is at most
# this value.
DEAD_RELATIVE_STD = 1e-3
# Latents with a pooled std below this value count as constant: their scale cannot be measured.
CONSTANT_STD = 1e-8
# Warn if the std of the scaled latents differs from 1 by more than this value.
SCALE_TOLERANCE = 0.2
# Warn if the mean of the scaled latents is more than this number of standard deviations from 0.
SHIFT_TOLERANCE = 0.25
# Warn if one channel's std is more than this many times the std of another channel.
STD_RATIO = 4.0
# Warn if two channels are correlated by more than this value.
HIGH_CORRELATION = 0.9


class Correlation(TypedDict):
    """The correlation of two channels."""

    value: float
    channels: list[int]


class LatentScale(TypedDict):
    """The measured scale of latents, and the scale in the network's config.

    `measured_scaling_factor` is 1 / std of all latents together, and `measured_shift_factor` is the
    mean of all latents. If the network has a posterior, the measured factors are those of samples
    from the posterior. `scaled_mean` and `scaled_std` are mean and std of the latents after shift
    and scaling with the factors of the network's config. If the config has `latents_mean` and
    `latents_std`, the latents are shifted by `latents_mean` and also divided by `latents_std`.
    """

    config_scaling_factor: float | None
    config_shift_factor: float | None
    measured_scaling_factor: float | None  # None if the latents are constant
    measured_shift_factor: float
    scaled_mean: float | None  # None if the config has no scaling_factor
    scaled_std: float | None


class _Information(TypedDict):
    kl_nats: list[float] | None  # KL to N(0, 1), mean per latent element
    kl_bits: list[float] | None
    active_units: int | None  # number of active channels. None without a posterior.
    active: list[bool] | None


class LatentReport(_Information):
    """The results of `LatentHealth`. Lists of statistics have one value per channel.

    If the network has a posterior, the moments are those of the posterior mean.
    """

    images: int
    mean: list[float]
    std: list[float]
    sample_std: list[float]  # std of posterior samples. Without a posterior, the same as `std`.
    minimum: list[float]
    maximum: list[float]
    kurtosis: list[float | None]  # excess, 0 for a Gaussian. None for a constant channel.
    dead_channels: list[int]
    correlation: list[list[float]]  # (d, d). 0 if a channel is constant.
    largest_correlation: Correlation | None  # largest by absolute value, without dead channels
    scale: LatentScale
    warnings: list[str]


class LatentHealth:
    """Measures statistics of latents over any number of batches, and returns a `LatentReport`.

        health = LatentHealth(num_channels=4)
        health.update(posterior.mean, logvar=posterior.logvar)  # (B, d, h, w) each
        health.result(scaling_factor=0.18215, shift_factor=None)["warnings"]

    Args:
        num_channels: number of latent channels d.
    """

    def __init__(self, num_channels: int) -> None:
        self._images = 0
        self._moments = RunningMoments(num_channels, covariance=True)  # over all latent positions
        zeros = torch.zeros(num_channels, dtype=torch.float64)
        self._sums = {
            "third": zeros.clone(),  # sums of powers of the deviations from the mean
            "fourth": zeros.clone(),
            "minimum": zeros + math.inf,
            "maximum": zeros - math.inf,
            "kl": zeros.clone(),
            "variance": zeros.clone(),  # of the posteriors
        }
        self._posterior: bool | None = None  # None until the first batch

    @property
    def positions(self) -> int:
        """Number of latent positions so far. A report needs at least 2 positions."""
        return self._moments.count

    def update(self, mean: Tensor, *, logvar: Tensor | None = None) -> None:
        """Add a batch of latents, (B, d, h, w).

        Args:
            mean: means of the posteriors, or the latents themselves if there is no posterior.
            logvar: log-variances of the posteriors. Give log-variances with every batch or with no
                batch.

        Raises:
            ValueError: shapes do not fit, a value is not finite, or only some batches have
                log-variances.
        """
        rows = self._rows(mean)
        if self._posterior not in (None, logvar is not None):
            raise ValueError("Log-variances must come with every batch of latents or with none.")
        if logvar is not None and logvar.shape != mean.shape:
            shapes = f"{tuple(mean.shape)} and {tuple(logvar.shape)}"
            raise ValueError(f"Means and log-variances must have the same shape (got {shapes}).")

        if logvar is not None:
            self._add_posterior(rows, self._rows(logvar))
        self._posterior = logvar is not None
        self._add_higher_moments(rows)  # first, because it needs the moments without this batch
        self._moments.update(rows)
        self._images += len(mean)

    def result(
        self,
        *,
        scaling_factor: float | None,
        shift_factor: float | None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> LatentReport:
        """Return the statistics of all batches as plain, finite numbers.

        Args:
            scaling_factor: value in the model's config. With None, the scale of the config is not
                compared with the measured scale.
            shift_factor: value in the model's config. None counts as 0, as in diffusers' pipelines.
            latents_mean: mean of each channel, from the config. If `latents_std` is set too,
                `latents_mean` replaces `shift_factor`.
            latents_std: standard deviation of each channel, from the config. diffusers'
                pipelines use `latents_mean` and `latents_std` only if both are set.
        """
        # statistics of the channels
        covariance = self._moments.covariance()
        noise = self._sums["variance"] / self._moments.count
        dead = self._dead(covariance.diagonal(), noise)
        correlation = self._correlation(covariance)
        largest = _largest_correlation(correlation, dead)
        sample_std = (covariance.diagonal() + noise).sqrt()

        # scale of the config
        norm = self._channel_norm(latents_mean, latents_std)
        scale = self._scale(scaling_factor, shift_factor, norm)

        return {
            "images": self._images,
            "mean": self._moments.mean.tolist(),
            "std": covariance.diagonal().sqrt().tolist(),
            "sample_std": sample_std.tolist(),
            "minimum": self._sums["minimum"].tolist(),
            "maximum": self._sums["maximum"].tolist(),
            "kurtosis": self._kurtosis(),
            **self._information(covariance),
            "dead_channels": dead,
            "correlation": correlation.tolist(),
            "largest_correlation": largest,
            "scale": scale,
            "warnings": [
                *_scale_warnings(scale),
                *_channel_warnings(dead, sample_std.tolist(), largest),
            ],
        }

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return all counts, sums and moments by name."""
        posterior = -1 if self._posterior is None else int(self._posterior)
        return {
            "images": np.asarray(self._images),
            "posterior": np.asarray(posterior),
            **{name: value.numpy().copy() for name, value in self._sums.items()},
            **self._moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Set all counts, sums and moments to the values that `state_dict` returned."""
        self._images, posterior = int(state["images"]), int(state["posterior"])
        self._posterior = None if posterior < 0 else bool(posterior)
        self._sums = {name: torch.from_numpy(state[name].copy()) for name in self._sums}
        self._moments.load_state_dict(state)

    def _rows(self, z: Tensor) -> Tensor:
        """Return latents (B, d, h, w) as rows (B * h * w, d), float64 on the CPU."""
        channels = len(self._moments.mean)
        if z.ndim != 4 or z.shape[1] != channels or z.numel() == 0:
            raise ValueError(f"Latents must be (B, {channels}, h, w) (got {tuple(z.shape)}).")
        rows = z.detach().cpu().double().movedim(1, -1).flatten(0, 2)
        if not rows.isfinite().all():
            raise ValueError("Latents must be finite numbers, but some are infinite or NaN.")
        return rows

    def _add_posterior(self, mean: Tensor, logvar: Tensor) -> None:
        variance = logvar.exp()
        self._sums["variance"] += variance.sum(dim=0)
        self._sums["kl"] += 0.5 * (mean.square() + variance - 1 - logvar).sum(dim=0)

    def _add_higher_moments(self, rows: Tensor) -> None:
        """Add a batch to the sums of third and fourth powers, the minimum and the maximum.

        Variable names with `a` belong to the earlier batches, names with `b` to this batch.
        """
        sums, n = self._sums, self._moments.count + len(rows)
        a, b = self._moments.count / n, len(rows) / n
        center = rows.mean(dim=0)
        delta, centered = center - self._moments.mean, rows - center
        a2, a3 = self._moments.scatter.diagonal(), sums["third"]
        b2, b3, b4 = (centered.pow(power).sum(dim=0) for power in (2, 3, 4))
        sums["fourth"] += b4 + delta**4 * (n * a * b * (a * a - a * b + b * b))
        sums["fourth"] += 6 * delta**2 * (a * a * b2 + b * b * a2) + 4 * delta * (a * b3 - b * a3)
        sums["third"] += b3 + delta**3 * (n * a * b * (a - b)) + 3 * delta * (a * b2 - b * a2)
        sums["minimum"] = torch.minimum(sums["minimum"], rows.amin(dim=0))
        sums["maximum"] = torch.maximum(sums["maximum"], rows.amax(dim=0))

    def _constant(self) -> Tensor:
        """Return which channels are constant, (d,).

        A channel is constant if its minimum equals its maximum. The variance is not tested, because
        rounding can make the variance of a constant channel slightly larger than 0.
        """
        return self._sums["minimum"] == self._sums["maximum"]

    def _kurtosis(self) -> list[float | None]:
        squares = self._moments.scatter.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
        excess = self._moments.count * (self._sums["fourth"] / squares / squares) - 3
        rows = zip(excess.tolist(), self._constant().tolist(), strict=True)
        return [None if constant else value for value, constant in rows]

    def _information(self, covariance: Tensor) -> _Information:
        """Return KL and active units. All values are None if the network has no posterior."""
        if not self._posterior:
            return {"kl_nats": None, "kl_bits": None, "active_units": None, "active": None}
        kl = self._sums["kl"] / self._moments.count
        active = covariance.diagonal() > ACTIVE_VARIANCE
        return {
            "kl_nats": kl.tolist(),
            "kl_bits": (kl / math.log(2)).tolist(),
            "active_units": int(active.sum()),
            "active": active.tolist(),
        }

    def _dead(self, variance: Tensor, noise: Tensor) -> list[int]:
        if self._posterior:
            dead = variance <= DEAD_SIGNAL_TO_NOISE * noise
        else:
            std = variance.sqrt()
            dead = std <= DEAD_RELATIVE_STD * std.quantile(0.5)
        return dead.nonzero().flatten().tolist()

    def _correlation(self, covariance: Tensor) -> Tensor:
        std = covariance.diagonal().sqrt().masked_fill(self._constant(), math.inf)
        return (covariance / std / std[:, None]).clamp(-1, 1)

    def _channel_norm(
        self, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> tuple[Tensor, Tensor] | None:
        if mean is None or std is None:
            return None
        if not len(mean) == len(std) == len(self._moments.mean):
            lengths, channels = f"{len(mean)} and {len(std)}", len(self._moments.mean)
            raise ValueError(
                f"latents_mean and latents_std must have {channels} values (got {lengths})."
            )
        return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)

    def _scale(
        self,
        scaling_factor: float | None,
        shift_factor: float | None,
        channel_norm: tuple[Tensor, Tensor] | None,
    ) -> LatentScale:
        mean, std = self._pooled(0.0, 1.0)
        scaled: tuple[float | None, float | None] = (None, None)
        if scaling_factor is not None:
            center, width = channel_norm or (shift_factor or 0.0, 1.0)
            scaled = self._pooled(center, scaling_factor / width)
        return {
            "config_scaling_factor": scaling_factor,
            "config_shift_factor": shift_factor,
            "measured_scaling_factor": 1 / std if std >= CONSTANT_STD else None,
            "measured_shift_factor": mean,
            "scaled_mean": scaled[0],
            "scaled_std": scaled[1],
        }

    def _pooled(self, shift: Tensor | float, factor: Tensor | float) -> tuple[float, float]:
        """Return mean and std of (latents - shift) * factor over all channels together.

        The std is that of the deviations from the mean over all channels, with the divisor n - 1.
        `latents.LatentStatistics` measures the same mean and std on posterior samples. This
        function draws no samples, but adds the mean variance of the posteriors to the variance of
        their means.
        """
        count, channels = self._moments.count, len(self._moments.mean)
        means = (self._moments.mean - shift) * factor
        within = (self._moments.scatter.diagonal() * factor**2).sum()
        between = (means - means.mean()).square().sum() * count
        noise = (self._sums["variance"] * factor**2).sum() / (count * channels)
        variance = (within + between) / (count * channels - 1) + noise
        return means.mean().item(), variance.sqrt().item()


def _largest_correlation(correlation: Tensor, dead: list[int]) -> Correlation | None:
    size = correlation.abs().triu(diagonal=1)
    size[dead], size[:, dead] = 0, 0  # the small noise of dead channels may correlate by chance
    if not size.any():
        return None
    i, j = divmod(int(size.argmax()), len(size))
    return {"value": correlation[i, j].item(), "channels": [i, j]}


def _scale_warnings(scale: LatentScale) -> list[str]:
    if scale["measured_scaling_factor"] is None:
        return ["The latents are constant, so their scale cannot be measured."]
    mean, std = scale["scaled_mean"], scale["scaled_std"]
    if mean is None or std is None:
        return []
    warnings = []
    if abs(std - 1) > SCALE_TOLERANCE:
        config = scale["config_scaling_factor"] or 1.0
        warnings.append(
            f"With the config's scaling_factor {config:.4g} the latents of these images have a "
            f"standard deviation of {std:.3g} instead of 1. A scaling_factor of {config / std:.4g} "
            "would give a standard deviation of 1."
        )
    if abs(mean) > SHIFT_TOLERANCE * std:
        warnings.append(
            f"The mean of the latents, scaled by the config, is {mean / std:+.2f} standard "
            f"deviations from 0. Before scaling, the mean is {scale['measured_shift_factor']:.4g}, "
            f"but the config's shift_factor is {scale['config_shift_factor'] or 0:.4g}."
        )
    return warnings


def _channel_warnings(dead: list[int], std: list[float], largest: Correlation | None) -> list[str]:
    warnings = []
    if dead:
        names = ", ".join(map(str, dead))
        warnings.append(
            f"Dead channels, which carry almost no information: {names} of {len(std)} channels."
        )
    alive = sorted((value, c) for c, value in enumerate(std) if c not in dead)
    if alive and alive[-1][0] > STD_RATIO * alive[0][0]:
        (low, narrow), (high, wide) = alive[0], alive[-1]
        warnings.append(
            f"The standard deviation of channel {wide} is {high / low:.1f} times that of channel "
            f"{narrow}. Normalise each channel by its own standard deviation."
        )
    if largest and abs(largest["value"]) > HIGH_CORRELATION:
        i, j = largest["channels"]
        warnings.append(f"Channels {i} and {j} are correlated by {largest['value']:+.2f}.")
    return warnings
