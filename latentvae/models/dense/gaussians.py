"""Diagonal Gaussians of latent vectors: samples, log-densities and KL divergences.

Symbols: `U` units of a latent vector.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussians of the U units of a latent vector.

    Attributes:
        mean: (..., U), float32.
        logvar: log-variance, (..., U), float32.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "Gaussian":
        """Return the Gaussian whose mean and log-variance are the two halves of `moments`.

        Args:
            moments: (..., 2 U) for U latent units.
        """
        mean, logvar = moments.float().chunk(2, dim=-1)
        return cls(mean, logvar)

    @classmethod
    def standard(cls, like: Tensor) -> "Gaussian":
        """Return N(0, I) with the shape of the tensor `like`."""
        zero = torch.zeros_like(like, dtype=torch.float32)
        return cls(zero, zero)

    def detach(self) -> "Gaussian":
        return Gaussian(self.mean.detach(), self.logvar.detach())

    def sample(self, *, count: int | None = None) -> Tensor:
        """Draw latents with torch's global generator.

        The result is (count, ..., U), or (..., U) without `count`, for U latent units.
        """
        shape = self.mean.shape if count is None else (count, *self.mean.shape)
        noise = torch.randn(shape, device=self.mean.device)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of latents (..., U), summed over the U units, in nats."""
        square = (z - self.mean).square() * (-self.logvar).exp()
        return -0.5 * (square + self.logvar + math.log(2.0 * math.pi)).sum(-1)

    def kl(self, other: "Gaussian") -> Tensor:
        """Return the KL divergence from this Gaussian to `other` for each unit, in nats."""
        ratio = self.logvar - other.logvar
        distance = (self.mean - other.mean).square() * (-other.logvar).exp()
        return 0.5 * (ratio.exp() + distance - 1.0 - ratio)
