"""Estimate the mutual information of images and latents (Hoffman and Johnson 2016, "ELBO surgery").

The mean KL of a VAE has two parts: E[KL(q(z|x), p(z))] = I(x; z) + KL(q(z), p(z)). A posterior that
has collapsed (is the same for all images) carries no information, although the second part of its
KL can be above 0.

Symbols: `N` images, `U` latent units.
"""

import math

import torch
from torch import Tensor


def mutual_information(
    means: Tensor, logvars: Tensor, *, samples: int = 1, generator: torch.Generator | None = None
) -> float:
    """Estimate the mutual information I(x; z) of N images x and latents z: at most ln N nats.

        I = mean over x, z ~ q(z|x) of ln q(z|x) - ln (1/N sum_j q(z|x_j))

    Args:
        means: means of the Gaussian posteriors, (N, U), on the CPU.
        logvars: log-variances of the posteriors, (N, U), on the CPU.
        samples: number of latents that are drawn for each image.
        generator: draws the latents. With None, torch's global generator draws the latents.
    """
    means, logvars = means.double(), logvars.double()
    stds, total = (0.5 * logvars).exp(), 0.0
    for _ in range(samples):
        noise = torch.randn(means.shape, generator=generator, dtype=means.dtype)
        z = means + stds * noise
        own = _log_density(z, means, logvars)
        mixture = torch.stack(
            [torch.logsumexp(_log_density(row, means, logvars), dim=0) for row in z]
        )
        total += (own - mixture + math.log(len(z))).mean().item()
    return total / samples


def _log_density(z: Tensor, means: Tensor, logvars: Tensor) -> Tensor:
    square = (z - means).square() * (-logvars).exp()
    return -0.5 * (square + logvars + math.log(2.0 * math.pi)).sum(-1)
