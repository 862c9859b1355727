"""Diagonal Gaussians of a group of latents, and how a posterior follows from a network's output.

All computations are in float32. ln(std) is clamped to [-8, 8], so that neither a KL divergence nor
a log density overflows. Clamping keeps NaN as NaN, so that the training loop can detect NaN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LOG_STD = 8.0

# For this beta, softplus(0) = 1, as in Efficient-VDVAE's gradient smoothing.
_BETA = math.log(2.0)

PosteriorName = Literal["full", "residual", "precision"]
StdName = Literal["exp", "softplus"]


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussians, one for each element of `mean` and `log_std`."""

    mean: Tensor
    log_std: Tensor

    def draw(self, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents. The temperature is a factor on the standard deviation."""
        shape, device = self.mean.shape, self.mean.device
        noise = torch.randn(shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + temperature * self.log_std.exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density of each element of `z`, in nats."""
        distance = (z - self.mean) * torch.exp(-self.log_std)
        return -0.5 * (distance.square() + math.log(2.0 * math.pi)) - self.log_std

    def kl_to(self, other: "Gaussian") -> Tensor:
        """Return the KL divergence from this Gaussian to `other` for each element, in nats."""
        log_ratio = self.log_std - other.log_std
        distance = (self.mean - other.mean) * torch.exp(-other.log_std)
        return 0.5 * (torch.exp(2.0 * log_ratio) + distance.square() - 1.0) - log_ratio


def exp_log_std(raw: Tensor) -> Tensor:
    """Return the network's output `raw` as ln(std), clamped to [-8, 8]."""
    return raw.float().clamp(-MAX_LOG_STD, MAX_LOG_STD)


def softplus_log_std(raw: Tensor) -> Tensor:
    """Return ln(std) for std = softplus(raw) with a smooth gradient (arXiv:2203.13751).

    softplus(x) = ln(1 + e^(beta x)) / beta with beta = ln 2, so softplus(0) = 1.
    """
    low, high = math.exp(-MAX_LOG_STD), math.exp(MAX_LOG_STD)
    return F.softplus(raw.float(), beta=_BETA).clamp(low, high).log()


LOG_STD: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": exp_log_std,
    "softplus": softplus_log_std,
}


class Posterior(NamedTuple):
    """Rule that computes the posterior of a group of latents from the network's output.

    Attributes:
        sees_decoder: whether the layers that predict the posterior read the decoder's maps besides
            the encoder's features.
        combine: function from the predicted Gaussian and the prior to the posterior.
    """

    sees_decoder: bool
    combine: Callable[[Gaussian, Gaussian], Gaussian]


def _full(own: Gaussian, prior: Gaussian) -> Gaussian:
    return own


def _residual(own: Gaussian, prior: Gaussian) -> Gaussian:
    """Return NVAE's posterior: add the means of `own` and `prior`, and multiply the stds.

    `own` is the Gaussian that the network predicts. See arXiv:2007.03898, section 3.2.
    """
    log_std = (prior.log_std + own.log_std).clamp(-MAX_LOG_STD, MAX_LOG_STD)
    return Gaussian(prior.mean + own.mean, log_std)


def _precision(own: Gaussian, prior: Gaussian) -> Gaussian:
    """Return Ladder VAE's posterior: its mean is the precision-weighted mean of `own` and `prior`.

    `own` is the Gaussian that the network predicts. The precision of the posterior is the sum of
    the precisions of `own` and `prior` (arXiv:1602.02282, equation 17).
    """
    log_precision = torch.logaddexp(-2.0 * own.log_std, -2.0 * prior.log_std)
    share = torch.exp(-2.0 * own.log_std - log_precision)
    log_std = (-0.5 * log_precision).clamp(-MAX_LOG_STD, MAX_LOG_STD)
    return Gaussian(prior.mean + share * (own.mean - prior.mean), log_std)


POSTERIORS: dict[str, Posterior] = {
    "full": Posterior(sees_decoder=True, combine=_full),
    "residual": Posterior(sees_decoder=True, combine=_residual),
    "precision": Posterior(sees_decoder=False, combine=_precision),
}
