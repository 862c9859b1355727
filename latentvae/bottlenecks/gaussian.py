"""Diagonal Gaussian posterior (Kingma & Welling 2013, arXiv:1312.6114).

moments (B, 2d, h, w) -> mean, logvar (B, d, h, w) -> z = mean + temperature * exp(logvar / 2) noise

Everything here is computed in float32, also under autocast.

`B` batch, `d` latent channels, `h w` latent positions.
"""

from typing import ClassVar, Literal, NamedTuple

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pydantic import Field
from torch import Tensor, nn

from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.option_marks import Positive


class GaussianLatent(NamedTuple):
    """The output of the bottleneck, in float32.

    Attributes:
        z: the latent, (B, d, h, w).
        mean: mean of the posterior, (B, d, h, w).
        kl: KL divergence from the posterior to N(0, I), (B, d), in nats per image and channel.
    """

    z: Tensor
    mean: Tensor
    kl: Tensor


class GaussianConfig(BottleneckConfig):
    """Options of the bottleneck: a diagonal Gaussian posterior, with a KL to N(0, I)."""

    type: Literal["gaussian"] = "gaussian"
    latent_channels: Positive = Field(default=4, description="Number of latent channels d.")

    @property
    def has_kl(self) -> bool:
        """Whether the latent has a KL divergence to a prior. Always true: the prior is N(0, I)."""
        return True


class GaussianBottleneck(nn.Module):
    """A bottleneck that samples from the encoder's posterior and computes its KL.

    Args:
        latent_channels: number of latent channels d. The features have 2 d channels: the mean and
            the log-variance.
    """

    kind: ClassVar[str] = "gaussian"

    def __init__(self, *, latent_channels: int) -> None:
        super().__init__()
        self.in_channels = 2 * latent_channels
        self.code_channels = latent_channels

    def forward(
        self, moments: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> GaussianLatent:
        """Return the latent and its KL.

        The KL has a closed form (arXiv:1312.6114, appendix B): the sum over positions of
        0.5 * (mean^2 + var - 1 - logvar).

        Args:
            moments: mean and log-variance concatenated along the channel axis, (B, 2d, h, w). The
                log-variance is clamped to [-30, 20], as in diffusers.
            sample: draw from the posterior with the global generator. False returns the posterior's
                mean.
            temperature: factor on the posterior's standard deviation. 1 is the posterior itself.
        """
        assert moments.shape[1] == self.in_channels, moments.shape
        posterior = DiagonalGaussianDistribution(moments.float())
        mean, var, logvar = posterior.mean, posterior.var, posterior.logvar
        kl = 0.5 * (mean.square() + var - 1.0 - logvar).sum(dim=(2, 3))  # (B, d)
        z = mean + temperature * (posterior.sample() - mean) if sample else mean
        return GaussianLatent(z, mean, kl)
