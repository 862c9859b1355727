"""Distributions of discrete pixel values, whose parameters a decoder returns.

Each distribution gives a probability to each of the `levels` values of a pixel, and these
probabilities sum to 1. So the likelihoods of all models with the same `levels` are comparable, in
nats per image or in bits per dimension. The value k, from 0 to levels - 1, stands for the pixel
2 k / (levels - 1) - 1 in [-1, 1].

A continuous distribution is made discrete as in PixelCNN++ (arXiv:1701.05517). The probability of a
value is the integral of the density over an interval around the value, called its bin. The bins of
the smallest and of the largest value reach to minus and plus infinity.

Symbols: `B` batch size, `C` image channels, `H W` image size, `M` parameter maps.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The smallest ln(scale). A scale of e^-7 is a ninth of the distance of neighbouring 8-bit values.
MIN_LOG_SCALE = -7.0
# The largest ln(scale). With a scale of 7.4, a distribution is already flat over [-1, 1].
MAX_LOG_SCALE = 2.0


class PixelDistribution(ABC):
    """A distribution of the pixels of an image, given the decoder's output.

        pixels = pixel_distribution("discretized_logistic")
        parameters = decoder(z)                        # (B, M, H, W), M = pixels.num_maps(C)
        nats = -pixels.log_prob(images, parameters)    # (B,)

    M is the number of parameter maps, and C is the number of image channels.

    Args:
        levels: number of values that a pixel can have, 2 or above. It is 256 for 8-bit images.
    """

    def __init__(self, levels: int = 256) -> None:
        self.levels = levels

    @abstractmethod
    def num_maps(self, channels: int) -> int:
        """Return the number of parameter maps for images with this number of channels."""

    def log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Return the log-probability of each image for S sets of parameters, (S B,), float32.

        The result is in nats.

        Args:
            images: pixels in [-1, 1], each one of the `levels` values, (B, C, H, W).
            parameters: the decoder's output of M maps, for S latent samples of each image,
                (S B, M, H, W). The first B entries belong to the first sample of each image.
        """
        images = images.float()
        samples = len(parameters) // len(images)
        if samples > 1:
            images = images.expand(samples, *images.shape).flatten(0, 1)
        return self._log_prob(images, parameters)

    @abstractmethod
    def _log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Return the log-probability of each image, (B,), in nats, from images in float32."""

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """Return the centre of the distribution as images (B, C, H, W) in [-1, 1]."""

    @abstractmethod
    def sample(self, parameters: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw images (B, C, H, W) in [-1, 1]. Each pixel is one of the `levels` values."""

    def start_bias(self, mean_image: Tensor) -> Tensor | None:
        """Return parameters for which `mean` returns `mean_image`, as biases of the last layer.

        The biases are (M, H, W) for M parameter maps. Return None if the distribution does not
        offer biases for a mean image.
        """
        return None

    def rounded(self, pixels: Tensor) -> Tensor:
        """Round pixels to the nearest of the `levels` values."""
        steps = (self.levels - 1) / 2
        return ((pixels.clamp(-1.0, 1.0) + 1.0) * steps).round() / steps - 1.0


class Bernoulli(PixelDistribution):
    """Independent pixels of two values, black (-1) and white (1). The parameters are logits.

    Images with grey pixels must be made binary first. For grey pixels, `log_prob` returns the
    negative cross entropy, which is not a likelihood.
    """

    def __init__(self, levels: int = 2) -> None:
        super().__init__(levels)

    def num_maps(self, channels: int) -> int:
        return channels

    def log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        # For a pixel x in [-1, 1], the share of white is (1 + x) / 2.
        white = (images.float().flatten(1) + 1.0) / 2.0
        result: Tensor = _BinaryLogProb.apply(parameters.float().flatten(1), white)  # type: ignore[assignment]
        return result

    def _log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        return self.log_prob(images, parameters)

    def mean(self, parameters: Tensor) -> Tensor:
        return 2.0 * parameters.float().sigmoid() - 1.0

    def sample(self, parameters: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return 2.0 * torch.bernoulli(parameters.float().sigmoid(), generator=generator) - 1.0

    def start_bias(self, mean_image: Tensor) -> Tensor:
        share = ((mean_image + 1.0) / 2.0).clamp(0.001, 0.999)
        return torch.logit(share)


class _BinaryLogProb(torch.autograd.Function):
    """Return sum_d x_d l_d - ln(1 + e^l_d), for logits l (S B, D) and pixels x in [0, 1], (B, D).

    There are S sets of logits for each of B images of D pixels. The gradient is x - sigmoid(l).
    This function needs half of the time and memory of torch's binary cross entropy, which computes
    a slow logarithm.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, white: Tensor) -> Tensor:
        shares = torch.sigmoid(logits)
        ctx.save_for_backward(shares, white)
        # ln(1 + e^l) = max(l, 0) - ln(sigmoid(|l|))
        softplus = torch.relu(logits) - torch.log(torch.maximum(shares, 1.0 - shares))
        # Under autocast, the einsum would compute in bfloat16.
        with torch.autocast(logits.device.type, enabled=False):
            white_logits = torch.einsum("sbd,bd->sb", logits.view(-1, *white.shape), white)
        return white_logits.flatten() - softplus.sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        shares, white = ctx.saved_tensors
        difference = white - shares.view(-1, *white.shape)
        return (difference * gradient.view(-1, len(white), 1)).view_as(shares), None


class LocationScale(PixelDistribution):
    """Base class of distributions of independent pixels, each with a location and a scale.

    For C channels, the parameters are first C maps of locations, then C maps of ln(scale).
    ln(scale) is clamped to [-7, 2]. The standard distribution (location 0, scale 1) must be
    symmetric about 0.
    """

    def num_maps(self, channels: int) -> int:
        return 2 * channels

    def _log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        location, log_scale = split(parameters)
        return self.log_mass(images, location, log_scale).flatten(1).sum(1)

    def log_mass(self, images: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        """Return the log-probability of each pixel value, in nats.

        The shapes of `images`, `location` and `log_scale` must broadcast.
        """
        half = 1.0 / (self.levels - 1)
        inverse = torch.exp(-log_scale)
        edges = ((images + side).clamp(-1.0, 1.0) for side in (-half, half))
        lower, upper = ((self._from_pixels(edge) - location) * inverse for edge in edges)
        # The bins of the smallest and of the largest value have only one finite edge.
        outer = torch.where(images < 0, self._log_cdf(upper), self._log_cdf(-lower))
        inside = images.abs() < 1.0 - half
        return torch.where(inside, self._log_between(lower, upper), outer)

    def mean(self, parameters: Tensor) -> Tensor:
        return self._to_pixels(split(parameters)[0]).clamp(-1.0, 1.0)

    def sample(self, parameters: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.draw(*split(parameters), generator=generator)

    def draw(
        self, location: Tensor, log_scale: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw a pixel for each location and ln(scale)."""
        share = torch.rand(location.shape, generator=generator, device=location.device)
        noise = self._quantile(share.clamp(1e-6, 1.0 - 1e-6))
        return self.rounded(self._to_pixels(location + log_scale.exp() * noise))

    @abstractmethod
    def _log_cdf(self, x: Tensor) -> Tensor:
        """Return ln F(x), where F is the standard distribution's cumulative distribution."""

    @abstractmethod
    def _log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return ln of the standard distribution's probability between `lower` and `upper`."""

    @abstractmethod
    def _quantile(self, share: Tensor) -> Tensor:
        """Return the x below which the standard distribution has the probability `share`."""

    def _from_pixels(self, pixels: Tensor) -> Tensor:
        """Map pixels to the values for which the distribution is defined, such as logits."""
        return pixels

    def _to_pixels(self, x: Tensor) -> Tensor:
        """Map values for which the distribution is defined back to pixels."""
        return x


class DiscretizedLogistic(LocationScale):
    """A logistic distribution, made discrete (arXiv:1606.04934 and PixelCNN++)."""

    def _log_cdf(self, x: Tensor) -> Tensor:
        return F.logsigmoid(x)

    def _log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - e^(l - u))
        return F.logsigmoid(upper) + F.logsigmoid(-lower) + log1mexp(lower - upper)

    def _quantile(self, share: Tensor) -> Tensor:
        return torch.logit(share)


class DiscretizedGaussian(LocationScale):
    """A Gaussian, made discrete. The scale is the standard deviation."""

    def _log_cdf(self, x: Tensor) -> Tensor:
        return log_normal_cdf(x)

    def _log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        # Mirror intervals on the positive side to the negative side, where ln F is more precise.
        right = lower + upper > 0
        lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
        log_lower, log_upper = (log_normal_cdf(x) for x in (lower, upper))
        return log_upper + log1mexp(log_lower - log_upper)

    def _quantile(self, share: Tensor) -> Tensor:
        return torch.special.ndtri(share)


class DiscretizedLogitLaplace(LocationScale):
    """A Laplace distribution of the logit of a pixel, made discrete.

    DALL-E uses the continuous distribution (arXiv:2102.12092, appendix A.3), whose density is in
    `LogitLaplace`. A pixel in [-1, 1] is mapped to [eps, 1 - eps], eps = 0.1, before the logit.
    """

    eps = 0.1

    def _log_cdf(self, x: Tensor) -> Tensor:
        left = x.clamp(max=0.0) - math.log(2.0)
        right = torch.log1p(-0.5 * torch.exp(-x.clamp(min=0.0)))
        return torch.where(x < 0, left, right)

    def _log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        right = lower + upper > 0
        lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)

        # `left` is for edges that are both below 0
        left = upper.clamp(max=0.0) - math.log(2.0) + log1mexp(lower - upper)
        lower, upper = lower.clamp(max=0.0), upper.clamp(min=0.0)
        across = -0.5 * (torch.expm1(lower) + torch.expm1(-upper))
        return torch.where(upper > 0, torch.log(across.clamp(min=1e-30)), left)

    def _quantile(self, share: Tensor) -> Tensor:
        side = share - 0.5
        return -side.sign() * torch.log1p(-2.0 * side.abs())

    def _from_pixels(self, pixels: Tensor) -> Tensor:
        return torch.logit(0.5 + (0.5 - self.eps) * pixels)

    def _to_pixels(self, x: Tensor) -> Tensor:
        return (torch.sigmoid(x) - 0.5) / (0.5 - self.eps)


def split(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Split 2 C parameter maps into C maps of locations and C maps of clamped ln(scale)."""
    location, log_scale = parameters.float().chunk(2, dim=1)
    return location, log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)


def log_normal_cdf(x: Tensor) -> Tensor:
    """Return the log of the standard Gaussian's cumulative distribution at x.

    The gradients of this function are correct also for very negative x. In float32, the gradient of
    torch's `log_ndtr` is wrong for x below about -1,000.
    """
    tail = x.clamp(max=-50.0)
    far = -0.5 * tail * tail - torch.log(-tail) - 0.5 * math.log(2.0 * math.pi)
    return torch.where(x < -50.0, far, torch.special.log_ndtr(x.clamp(min=-50.0)))


def log1mexp(x: Tensor) -> Tensor:
    """Return ln(1 - e^x) for x < 0.

    Far in the tail of a distribution, rounding can make x = 0. An upper limit on x keeps value and
    gradient finite in this case.
    """
    return torch.log(-torch.expm1(x.clamp(max=-1e-6)))
