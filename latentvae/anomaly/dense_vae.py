"""Define a dense VAE for rows of numbers, with a Gaussian decoder that learns variances.

    x -> encoder -> q(z|x) = N(mean, std) -> z -> decoder -> p(x|z) = N(mean, std)

Symbols: `N` rows, `F` columns of x, `D` columns of z, `L` samples of z.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentvae.anomaly.dagmm_network import tanh_layers

MAX_LOG_STD = 5.0  # e^5 = 148 standard deviations of the training rows


class Terms(NamedTuple):
    """Log densities in nats for each sample of z of each row. Each tensor is (L, N)."""

    likelihood: Tensor  # log p(x|z)
    prior: Tensor  # log p(z)
    posterior: Tensor  # log q(z|x)


class DenseVAE(nn.Module):
    """A VAE for rows of numbers, with tanh layers and Gaussian outputs of encoder and decoder.

    Args:
        num_features: number of columns F.
        hidden: widths of the encoder's hidden layers. The decoder mirrors them.
        latent_dim: number of columns D of z.
        min_std: smallest standard deviation of p(x|z), in units of the columns of x.
        std_per_row: whether the decoder computes standard deviations for each row. Otherwise each
            column has one learned standard deviation.
    """

    def __init__(
        self,
        num_features: int,
        *,
        hidden: Sequence[int],
        latent_dim: int,
        min_std: float,
        std_per_row: bool,
    ) -> None:
        super().__init__()
        self.encoder = tanh_layers([num_features, *hidden, 2 * latent_dim])
        outputs = 2 * num_features if std_per_row else num_features
        self.decoder = tanh_layers([latent_dim, *hidden[::-1], outputs])
        self.log_std = None if std_per_row else nn.Parameter(torch.zeros(num_features))
        self.min_log_std = math.log(min_std)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation of q(z|x), each (N, D)."""
        mean, log_std = self.encoder(x).chunk(2, dim=-1)
        return mean, log_std.clamp(-MAX_LOG_STD, MAX_LOG_STD)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation of p(x|z), each (..., F)."""
        out = self.decoder(z)
        if self.log_std is None:
            mean, log_std = out.chunk(2, dim=-1)
        else:
            mean, log_std = out, self.log_std.expand_as(out)
        return mean, log_std.clamp(self.min_log_std, MAX_LOG_STD)

    def elbo(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the evidence lower bound of each row in nats, (N,), with the KL in closed form.

        Args:
            x: rows, (N, F).
            noise: standard normal draws, (N, D).
        """
        mean, log_std = self.encode(x)
        likelihood = log_normal(x, *self.decode(mean + log_std.exp() * noise))
        return likelihood - gaussian_kl(mean, log_std)

    def terms(self, x: Tensor, noise: Tensor) -> Terms:
        """Return the log densities for L samples of z of each row.

        Args:
            x: rows, (N, F).
            noise: standard normal draws that all rows share, (L, D).
        """
        mean, log_std = self.encode(x)
        z = mean + log_std.exp() * noise[:, None]  # (L, N, D)
        return Terms(
            log_normal(x, *self.decode(z)),
            log_normal(z, torch.zeros_like(z), torch.zeros_like(z)),
            log_normal(z, mean, log_std),
        )


def log_normal(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log density of independent Gaussians, summed over the last axis, in nats."""
    white = (x - mean) * torch.exp(-log_std)
    return -(0.5 * white.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def gaussian_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """Return KL(N(mean, std) || N(0, 1)) in nats, summed over the last axis."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(dim=-1)
