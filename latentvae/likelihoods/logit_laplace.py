"""The logit-Laplace likelihood of images, for decoders that return its parameters.

Symbols: `B` batch size, `C` image channels, `H W` image size. Images are in [-1, 1].
"""

import math

import torch
from torch import Tensor

# The largest |ln b| of a scale b. The smallest scale, e^-7, is at most a tenth of the distance
# between the logits of neighbouring 8-bit values.
MAX_LOG_SCALE = 7.0


class LogitLaplace:
    """A Laplace distribution of the logit of each pixel (DALL-E, arXiv:2102.12092, appendix A.3).

    A pixel in [-1, 1] is mapped to x in [eps, 1 - eps], eps = 0.1, where the logit lies in
    [-2.2, 2.2]. The density of x on (0, 1), with location mu and scale b, is

        f(x; mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)).

    The decoder returns 2 C maps for C image channels: first C maps of mu, then C maps of ln b. ln b
    is clamped to [-7, 7]. Without this limit, the density of pixels that the decoder predicts
    exactly could become infinite. All computations are in float32.

        likelihood = LogitLaplace()
        loss = likelihood.nll(images, decoder(z)).mean()
    """

    eps = 0.1

    def nll(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Return the negative log-likelihood -ln f of each element, (B, C, H, W), in nats.

        Here f is the density of x, the pixel mapped to [eps, 1 - eps], eps = 0.1, as in DALL-E.
        For the density of a pixel in [0, 1], add -ln(1 - 2 eps) = 0.223 nats to the result. For the
        density of a pixel in [-1, 1], add -ln(0.5 - eps) = 0.916 nats to the result.

        Args:
            images: images in [-1, 1], (B, C, H, W).
            parameters: the decoder's output, C maps of the location mu and C maps of the
                log-scale ln b, (B, 2 C, H, W).
        """
        x = self.map_pixels(images.float())
        mu, log_b = _location_and_log_scale(parameters)
        distance = (torch.logit(x) - mu).abs()
        return math.log(2.0) + log_b + torch.log(x * (1.0 - x)) + distance * torch.exp(-log_b)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the distribution's median, sigmoid(mu), as images (B, C, H, W) in [-1, 1].

        DALL-E uses the median too.
        """
        return self.unmap_pixels(torch.sigmoid(_location_and_log_scale(parameters)[0]))

    def sample(self, parameters: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw images (B, C, H, W). Values outside of [-1, 1] are clamped.

        Args:
            parameters: the decoder's output, C maps of the location mu and C maps of the
                log-scale ln b, (B, 2 C, H, W).
            generator: random generator on the device of `parameters`. None means torch's global
                generator.
        """
        mu, log_b = _location_and_log_scale(parameters)
        # The difference of two exponential random variables has a Laplace distribution.
        first, second = (torch.empty_like(mu).exponential_(generator=generator) for _ in range(2))
        return self.unmap_pixels(torch.sigmoid(mu + log_b.exp() * (first - second)))

    def map_pixels(self, images: Tensor) -> Tensor:
        """Map pixels in [-1, 1] linearly to x in [eps, 1 - eps], eps = 0.1."""
        return 0.5 + (0.5 - self.eps) * images

    def unmap_pixels(self, x: Tensor) -> Tensor:
        """Map x in [0, 1] back to pixels by the inverse of `map_pixels`, clamped to [-1, 1]."""
        return ((x - 0.5) / (0.5 - self.eps)).clamp(-1.0, 1.0)


def _location_and_log_scale(parameters: Tensor) -> tuple[Tensor, Tensor]:
    location, log_scale = parameters.float().chunk(2, dim=1)
    return location, log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)
