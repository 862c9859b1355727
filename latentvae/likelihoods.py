"""Likelihoods of images: what a decoder's maps say of every pixel.

`B` batch, `C` image channels, `H W` space. Images are in [-1, 1].
"""

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = 7.0  # |ln b|: e^-7 logits are a tenth of an 8-bit step or less


class LogitLaplace:
    """A Laplace distribution of the logit of the pixel (DALL-E, arXiv:2102.12092, appendix A.3).

    A pixel in [-1, 1] is mapped to x in [eps, 1 - eps], eps = 0.1, where the logit is tame;

        f(x; mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)) on (0, 1).

    The decoder gives 2 C maps: C of mu, then C of ln b, which is clamped to [-7, 7]: a flat area
    would make the density infinite. Everything is float32.

        likelihood = LogitLaplace()
        loss = likelihood.nll(images, decoder(z)).mean()
    """

    eps = 0.1

    def nll(self, images: Tensor, parameters: Tensor) -> Tensor:
        """-ln f of each element, (B, C, H, W), nats.

        The density is that of x, as in the paper. Of the pixel in [0, 1] it is 1 - 2 eps times
        that: add -ln(0.8) = 0.223 nats; of the pixel in [-1, 1]: -ln(0.4) = 0.916.

        Args:
            images: in [-1, 1], (B, C, H, W).
            parameters: mu and ln b, (B, 2 C, H, W).
        """
        x = self.map_pixels(images.float())
        mu, log_b = _location_and_log_scale(parameters)
        distance = (torch.logit(x) - mu).abs()
        return math.log(2.0) + log_b + torch.log(x * (1.0 - x)) + distance * torch.exp(-log_b)

    def mean(self, parameters: Tensor) -> Tensor:
        """Images in [-1, 1], (B, C, H, W): sigmoid(mu), which is the median, as DALL-E shows it."""
        return self.unmap_pixels(torch.sigmoid(_location_and_log_scale(parameters)[0]))

    def sample(self, parameters: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Images in [-1, 1], (B, C, H, W): the draws that fall outside are clamped.

        Args:
            parameters: mu and ln b, (B, 2 C, H, W).
            generator: on their device; None: the global one.
        """
        mu, log_b = _location_and_log_scale(parameters)
        # The difference of two exponential variables is a Laplace one.
        first, second = (torch.empty_like(mu).exponential_(generator=generator) for _ in range(2))
        return self.unmap_pixels(torch.sigmoid(mu + log_b.exp() * (first - second)))

    def map_pixels(self, images: Tensor) -> Tensor:
        """[-1, 1] to [eps, 1 - eps]."""
        return 0.5 + (0.5 - self.eps) * images

    def unmap_pixels(self, x: Tensor) -> Tensor:
        """The inverse, clamped to [-1, 1]."""
        return ((x - 0.5) / (0.5 - self.eps)).clamp(-1.0, 1.0)


def _location_and_log_scale(parameters: Tensor) -> tuple[Tensor, Tensor]:
    location, log_scale = parameters.float().chunk(2, dim=1)
    return location, log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)
