"""Gaussian posterior whose prior is a learned flow (Flow-VAE, arXiv:2505.07916).

moments (B, 2d, h, w) -> z (B, d, h, w) -> decoder
                         z -> flow f -> f(z), compared with N(0, I)

    KL = E_q[log q(z|x) - log N(f(z); 0, I) - log |det df/dz|]

The flow changes neither the posterior nor the decoder's input. Only the KL in training depends on
the flow. So the trained network encodes and decodes in the same way with and without the flow.

`B` batch, `d` latent channels, `h w` latent positions.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from latentvae.bottlenecks.couplings import CouplingFlow
from latentvae.bottlenecks.gaussian import (
    GaussianBottleneck,
    GaussianConfig,
    GaussianLatent,
    gaussian_kl,
)
from latentvae.option_marks import Positive


class FlowConfig(GaussianConfig):
    """Options of the bottleneck: a Gaussian posterior, with a KL to a learned prior."""

    type: Literal["flow"] = "flow"  # type: ignore[assignment]
    layers: Positive = Field(default=8, description="Number of coupling layers of the flow.")
    width: Positive = Field(
        default=64, description="Number of hidden channels of each coupling layer."
    )


class FlowBottleneck(GaussianBottleneck):
    """A Gaussian posterior, with a KL to a prior that a learned flow describes.

    At the start of training the flow is the identity, so the KL equals that of
    `GaussianBottleneck`.

    Args:
        latent_channels: number of latent channels d.
        posterior_logvar: see `GaussianBottleneck`.
        layers: number of coupling layers.
        width: number of hidden channels of each layer.
    """

    kind: ClassVar[str] = "flow"

    def __init__(
        self,
        *,
        latent_channels: int,
        posterior_logvar: float | None = None,
        layers: int = 8,
        width: int = 64,
    ) -> None:
        super().__init__(latent_channels=latent_channels, posterior_logvar=posterior_logvar)
        self.flow = CouplingFlow(latent_channels, layers=layers, width=width)

    def forward(
        self, moments: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> GaussianLatent:
        """Return the latent and an estimate of its KL from one sample, without a KL per channel.

        The estimate is the KL from the posterior q to N(0, I), which has a closed form, plus a
        second term. The second term is the log-density of N(0, I) minus that of the learned prior,
        at a sample z. With the flow f:

            KL = KL(q, N(0, I)) + (f(z)^2 - z^2) / 2 - log |det df/dz|

        The expected value of the estimate is the true KL to the learned prior. The flow mixes
        channels, so the KL of one channel is not defined.

        Args:
            moments: mean and log-variance of d channels, (B, 2d, h, w).
            sample: draw the latent. If `sample` is False, the latent is the mean. The KL always
                uses a sample.
            temperature: factor on the standard deviation of the drawn latent. The KL does not
                depend on this factor.
        """
        posterior = self.posterior(moments)
        drawn = posterior.sample()
        z = posterior.mean + temperature * (drawn - posterior.mean) if sample else posterior.mean

        kl = gaussian_kl(posterior).sum(dim=1) + self.kl_difference(drawn)
        return GaussianLatent(z, posterior.mean, kl, None)

    def kl_difference(self, z: Tensor) -> Tensor:
        """Return log N(z; 0, I) minus the log-density of the learned prior, (B,), in nats.

        Args:
            z: samples of the posterior, (B, d, h, w).
        """
        noise, log_determinant = self.flow(z)
        return 0.5 * (noise.square() - z.square()).sum(dim=(1, 2, 3)) - log_determinant
