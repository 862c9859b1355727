"""Mean and standard deviation of latents: what an export's `scaling_factor` and shift come from.

A diffusion model is trained on latents of about unit variance (Rombach et al. 2022, appendix G,
https://arxiv.org/abs/2112.10752). The sums are kept in float64 and joined by Chan's rule, so that
batches and ranks may come in any number and order.

`B` batch, `d` latent channels, `h w` latent space.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from latentvae.distributed import gather_objects
from latentvae.models.calls import encode


class LatentStatistics:
    """Running mean and variance of latents, per channel and over all channels.

    statistics = LatentStatistics()
    statistics.update(z)  # (B, d, h, w), any number of times
    statistics.scaling_factor
    """

    def __init__(self) -> None:
        self.num_images = 0
        self._count = 0  # elements per channel
        self._mean = torch.zeros(0, dtype=torch.float64)  # (d,)
        self._squares = torch.zeros(0, dtype=torch.float64)  # (d,), about the channel's mean

    def update(self, z: Tensor) -> None:
        """Take in a batch of latents, (B, d, h, w)."""
        if z.ndim != 4 or z.numel() == 0:
            raise ValueError(f"latents are (B, d, h, w), not {tuple(z.shape)}")
        values = z.detach().cpu().double().transpose(0, 1).flatten(1)  # (d, B * h * w)
        batch = LatentStatistics()
        batch.num_images, batch._count = len(z), values.shape[1]
        batch._mean = values.mean(dim=1)
        batch._squares = values.var(dim=1, correction=0) * batch._count
        if not batch._squares.isfinite().all():
            raise ValueError("latents hold values that are not finite: nothing can be measured")
        self.merge(batch)

    def merge(self, other: "LatentStatistics") -> None:
        """Take in everything that `other` has seen (Chan, Golub and LeVeque 1979)."""
        if other._count == 0:
            return
        if self._count == 0:
            self._mean, self._squares = other._mean.clone(), other._squares.clone()
        else:
            if self.num_channels != other.num_channels:
                channels = f"{self.num_channels} and {other.num_channels}"
                raise ValueError(f"latents have one number of channels, not {channels}")
            total, delta = self._count + other._count, other._mean - self._mean
            self._squares += other._squares + delta.square() * (self._count * other._count / total)
            self._mean += delta * (other._count / total)
        self._count += other._count
        self.num_images += other.num_images

    def joined(self) -> "LatentStatistics":
        """The statistics of all ranks together, the same on every rank."""
        result = LatentStatistics()
        for part in gather_objects(self):
            result.merge(part)
        return result

    @property
    def num_channels(self) -> int:
        return len(self._mean)

    @property
    def channel_mean(self) -> Tensor:
        """(d,), float64."""
        return self._mean.clone()

    @property
    def channel_std(self) -> Tensor:
        """(d,), float64; each about its own channel's mean (divisor n - 1)."""
        self._require(self._count)
        return (self._squares / (self._count - 1)).sqrt()

    @property
    def mean(self) -> float:
        """The pooled mean, over all channels."""
        self._require(self._count)
        return self._mean.mean().item()

    @property
    def std(self) -> float:
        """The pooled standard deviation, about the pooled mean (divisor n - 1)."""
        elements = self._count * self.num_channels
        self._require(elements)
        between = (self._mean - self._mean.mean()).square().sum() * self._count
        return math.sqrt((self._squares.sum() + between).item() / (elements - 1))

    @property
    def rms(self) -> float:
        """The pooled root mean square, about zero."""
        self._require(self._count * self.num_channels)
        squares = self._squares.sum() + self._count * self._mean.square().sum()
        return math.sqrt(squares.item() / (self._count * self.num_channels))

    @property
    def scaling_factor(self) -> float:
        """1 / std: latents times this have unit variance."""
        std = self.std
        if std < 1e-8:
            raise ValueError(f"the latents are constant (std {std:g}), so no scale can be measured")
        return 1.0 / std

    @property
    def shift_factor(self) -> float:
        """The pooled mean: latents minus this are centred."""
        return self.mean

    def to_dict(self) -> dict[str, Any]:
        """All results as plain numbers, for a report."""
        return {
            "num_images": self.num_images,
            "mean": self.mean,
            "std": self.std,
            "channel_mean": self.channel_mean.tolist(),
            "channel_std": self.channel_std.tolist(),
        }

    def _require(self, elements: int) -> None:
        if elements < 2:
            raise ValueError(f"{elements} latent elements were seen; at least 2 are needed")


@torch.no_grad()
def latent_statistics(
    net: Any,
    batches: Iterable[Tensor],
    *,
    max_images: int = 1024,
    generator: torch.Generator | None = None,
) -> LatentStatistics:
    """Statistics of posterior samples (without a posterior: of latents) of the first `max_images`
    images of this process.

    Args:
        net: in eval mode, on the device of the batches.
        batches: images (B, C, H, W) in [-1, 1], without augmentation.
        generator: draws the samples; None takes the global one.
    """
    statistics = LatentStatistics()
    for batch in batches:
        images = batch[: max_images - statistics.num_images]
        statistics.update(encode(net, images, sample=True, generator=generator))
        if statistics.num_images >= max_images:
            break
    return statistics
