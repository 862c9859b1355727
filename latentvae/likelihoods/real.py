"""Gaussian densities of real values, for rows of tables and for latents of another network.

The distributions in `likelihoods.pixels` give a probability to each value that a pixel can have.
`RealGaussian` gives a density to any real value. `latentvae train-vae` does not offer
`RealGaussian`, because log-densities and log-probabilities cannot be compared.
"""

import math

import torch
from torch import Tensor

from latentvae.likelihoods.pixels import PixelDistribution, split


class RealGaussian(PixelDistribution):
    """Independent Gaussians of real values, one for each pixel and channel.

    For C channels, the parameters are first C maps of means, then C maps of ln(std). ln(std) is
    clamped to [-7, 2].
    """

    def num_maps(self, channels: int) -> int:
        return 2 * channels

    def _log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        mean, log_scale = split(parameters)
        square = ((images - mean) * torch.exp(-log_scale)).square()
        logs = -0.5 * square - log_scale - 0.5 * math.log(2.0 * math.pi)
        return logs.flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        return split(parameters)[0]

    def sample(self, parameters: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = split(parameters)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + log_scale.exp() * noise
