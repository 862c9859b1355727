"""Diagonal Gaussian posterior (Kingma & Welling 2013, arXiv:1312.6114), in float32 under any
autocast.

moments (B, 2d, h, w) -> mean, logvar (B, d, h, w) -> z = mean + exp(logvar / 2) * temperature *
noise
"""

from typing import NamedTuple

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


class GaussianLatent(NamedTuple):
    """What the bottleneck gives, float32.

    Attributes:
        z: the latent, (B, d, h, w).
        mean: of the posterior, (B, d, h, w).
        kl: from the posterior to N(0, I), (B, d), nats per image and channel.
    """

    z: Tensor
    mean: Tensor
    kl: Tensor


def gaussian_bottleneck(
    moments: Tensor, *, sample: bool = True, temperature: float = 1.0
) -> GaussianLatent:
    """Latent and KL of the posterior that ``moments`` describe.

    The KL is in closed form (arXiv:1312.6114, appendix B): 0.5 * sum(mean^2 + var - 1 - logvar)
    over positions.

    Args:
        moments: mean and log-variance joined on the channel axis, (B, 2d, h, w); the log-variance
            is clamped to [-30, 20] as diffusers does.
        sample: draw from the posterior with the global generator, or take its mode.
        temperature: factor on the posterior's standard deviation; 1 is the posterior itself.
    """
    posterior = DiagonalGaussianDistribution(moments.float())
    mean, var, logvar = posterior.mean, posterior.var, posterior.logvar
    kl = 0.5 * (mean.square() + var - 1.0 - logvar).sum(dim=(2, 3))  # (B, d)
    z = mean + temperature * (posterior.sample() - mean) if sample else mean
    return GaussianLatent(z, mean, kl)
