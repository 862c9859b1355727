"""Measure mean and standard deviation of latents, for the shift and scale of an exported model.

A diffusion model is trained on latents of about unit variance (Rombach et al. 2022, appendix G,
https://arxiv.org/abs/2112.10752).

Symbols: `B` batch size, `d` latent channels, `h w` latent positions.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from latentvae.compute.precision import full_float32
from latentvae.distributed import gather_objects
from latentvae.models import Network
from latentvae.models.calls import encode
from latentvae.moments import RunningMoments


class LatentStatistics:
    """Running mean and variance of latents, per channel and over all channels.

    statistics = LatentStatistics()
    statistics.update(z)  # (B, d, h, w), any number of times
    statistics.scaling_factor
    """

    def __init__(self) -> None:
        self.num_images = 0
        self._moments = RunningMoments()  # of the channels, over images and positions

    def update(self, z: Tensor) -> None:
        """Add a batch of latents, (B, d, h, w)."""
        if z.ndim != 4 or z.numel() == 0:
            raise ValueError(f"latents must be (B, d, h, w) (got {tuple(z.shape)}).")
        batch = LatentStatistics()
        batch.num_images = len(z)
        # Each channel is one contiguous row. Another order would change the sums' last digits.
        values = z.detach().cpu().double().transpose(0, 1).flatten(1)  # (d, B * h * w)
        batch._moments.update(values, axis=0)
        if not batch._moments.scatter.isfinite().all():
            raise ValueError("the latents have values that are not finite, so nothing is measured.")
        self.merge(batch)

    def merge(self, other: "LatentStatistics") -> None:
        """Merge the statistics of `other` into these statistics."""
        if self.num_images and other.num_images and self.num_channels != other.num_channels:
            channels = f"{self.num_channels} and {other.num_channels}"
            raise ValueError(f"all latents must have the same number of channels (got {channels}).")
        self._moments.join(other._moments)
        self.num_images += other.num_images

    def joined(self) -> "LatentStatistics":
        """Return the statistics over the latents of all ranks, the same on every rank."""
        result = LatentStatistics()
        for part in gather_objects(self):
            result.merge(part)
        return result

    @property
    def num_channels(self) -> int:
        return self._moments.num_features

    @property
    def channel_mean(self) -> Tensor:
        """Mean of each channel (d,), float64."""
        return self._moments.mean.clone()

    @property
    def channel_std(self) -> Tensor:
        """Standard deviation of each channel about its mean (d,), float64 (divisor n - 1)."""
        return self._moments.std()

    @property
    def mean(self) -> float:
        """The mean over all latent elements of all channels."""
        self._require(self._moments.count)
        return self._moments.mean.mean().item()

    @property
    def std(self) -> float:
        """The standard deviation of all latent elements about their mean (divisor n - 1)."""
        moments, elements = self._moments, self._moments.count * self.num_channels
        self._require(elements)
        # `RunningMoments.pooled` sums in another order, which would change an export's last digit.
        between = (moments.mean - moments.mean.mean()).square().sum() * moments.count
        return math.sqrt((moments.scatter.sum() + between).item() / (elements - 1))

    @property
    def rms(self) -> float:
        """The root mean square of all latent elements."""
        count = self._moments.count
        self._require(count * self.num_channels)
        squares = self._moments.scatter.sum() + count * self._moments.mean.square().sum()
        return math.sqrt(squares.item() / (count * self.num_channels))

    @property
    def scaling_factor(self) -> float:
        """1 / std. Latents multiplied by this factor have unit variance."""
        std = self.std
        if std < 1e-8:
            raise ValueError(
                f"the latents are constant (std {std:g}), so they have no scaling factor."
            )
        return 1.0 / std

    @property
    def shift_factor(self) -> float:
        """The mean of all latent elements. Latents minus this value have mean 0."""
        return self.mean

    def to_dict(self) -> dict[str, Any]:
        """Return the number of images, the means and the standard deviations, for a report."""
        return {
            "num_images": self.num_images,
            "mean": self.mean,
            "std": self.std,
            "channel_mean": self.channel_mean.tolist(),
            "channel_std": self.channel_std.tolist(),
        }

    def _require(self, elements: int) -> None:
        if elements < 2:
            raise ValueError(f"at least 2 latent elements are needed (got {elements}).")


@full_float32()
@torch.no_grad()
def latent_statistics(
    net: Network,
    batches: Iterable[Tensor],
    *,
    max_images: int = 1024,
    generator: torch.Generator | None = None,
) -> LatentStatistics:
    """Return statistics of samples from the posteriors of this process's first images.

    If the network has no posterior, the network's latents are used instead of samples.

    Args:
        net: the network, in eval mode and on the device of the batches.
        batches: images (B, C, H, W) in [-1, 1], without augmentation.
        max_images: at most this many images of this process are used.
        generator: generator of the samples. None means PyTorch's global generator.
    """
    statistics = LatentStatistics()
    for batch in batches:
        images = batch[: max_images - statistics.num_images]
        statistics.update(encode(net, images, sample=True, generator=generator))
        if statistics.num_images >= max_images:
            break
    return statistics
