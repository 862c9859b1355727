"""Diagonal Gaussian posterior (Kingma & Welling 2013, arXiv:1312.6114).

moments (B, 2d, h, w) -> mean, logvar (B, d, h, w) -> z = mean + temperature * exp(logvar / 2) noise

All values in this module are computed in float32, also under autocast.

`B` batch, `d` latent channels, `h w` latent positions.
"""

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pydantic import Field
from torch import Tensor, nn

from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.option_marks import Positive

# Log-variance of a posterior. diffusers clamps log-variances to this range.
Logvar = Annotated[float, Field(ge=-30.0, le=20.0)]


class GaussianLatent(NamedTuple):
    """The output of the bottleneck, in float32.

    Attributes:
        z: the latent, (B, d, h, w).
        mean: mean of the posterior, (B, d, h, w).
        kl: KL divergence from the posterior to the prior, (B,), in nats per image.
        kl_per_channel: the KL of each channel, (B, d), or None if it is not defined.
    """

    z: Tensor
    mean: Tensor
    kl: Tensor
    kl_per_channel: Tensor | None


class GaussianConfig(BottleneckConfig):
    """Options of the bottleneck: a diagonal Gaussian posterior, with a KL to N(0, I)."""

    type: Literal["gaussian"] = "gaussian"
    latent_channels: Positive = Field(default=4, description="Number of latent channels.")
    posterior_logvar: Logvar | None = Field(
        default=None,
        description=(
            "Fixed log-variance of every posterior. By default (None), the encoder predicts the "
            "log-variance."
        ),
    )

    @property
    def has_kl(self) -> bool:
        """Whether the latent has a KL divergence to a prior. Always true."""
        return True


class GaussianBottleneck(nn.Module):
    """A bottleneck that samples from the encoder's posterior and computes its KL to N(0, I).

    Args:
        latent_channels: number of latent channels d. The encoder's output has 2 d channels: the
            mean and the log-variance.
        posterior_logvar: constant that replaces the encoder's log-variance, as in SimFlow
            (arXiv:2512.04084). None keeps the encoder's log-variance.
    """

    kind: ClassVar[str] = "gaussian"

    def __init__(self, *, latent_channels: int, posterior_logvar: float | None = None) -> None:
        super().__init__()
        self.in_channels = 2 * latent_channels
        self.code_channels = latent_channels
        self.posterior_logvar = posterior_logvar

    def forward(
        self, moments: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> GaussianLatent:
        """Return the latent and its KL.

        Args:
            moments: mean and log-variance concatenated along the channel axis, (B, 2d, h, w). The
                log-variance is clamped to [-30, 20], as in diffusers.
            sample: draw from the posterior with torch's global generator. If `sample` is False, the
                latent is the posterior's mean.
            temperature: factor on the posterior's standard deviation. With 1, the latent is drawn
                from the posterior itself.
        """
        posterior = self.posterior(moments)
        mean, kl = posterior.mean, gaussian_kl(posterior)
        z = mean + temperature * (posterior.sample() - mean) if sample else mean
        return GaussianLatent(z, mean, kl.sum(dim=1), kl)

    def posterior(self, moments: Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior that the moments (B, 2d, h, w) describe, in float32."""
        assert moments.shape[1] == self.in_channels, moments.shape
        moments = moments.float()
        if self.posterior_logvar is not None:
            mean = moments.chunk(2, dim=1)[0]
            moments = torch.cat([mean, torch.full_like(mean, self.posterior_logvar)], dim=1)
        return DiagonalGaussianDistribution(moments)


def gaussian_kl(posterior: DiagonalGaussianDistribution) -> Tensor:
    """Return the KL from a posterior to N(0, I) for each image and channel, (B, d), in nats.

    The KL has a closed form (arXiv:1312.6114, appendix B). The KL of a channel is the sum over
    positions of 0.5 * (mean^2 + var - 1 - logvar).
    """
    mean, var, logvar = posterior.mean, posterior.var, posterior.logvar
    return 0.5 * (mean.square() + var - 1.0 - logvar).sum(dim=(2, 3))
