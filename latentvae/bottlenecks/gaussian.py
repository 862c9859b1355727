"""Diagonal Gaussian posterior (Kingma & Welling 2013, arXiv:1312.6114), in float32 under any
autocast.

moments (B, 2d, h, w) -> mean, logvar (B, d, h, w) -> z = mean + exp(logvar / 2) * temperature *
noise
"""

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


def gaussian_bottleneck(
    moments: Tensor, *, sample: bool = True, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Latent and KL of the posterior that ``moments`` describe.

    Args:
        moments: mean and log-variance joined on the channel axis, (B, 2d, h, w); the log-variance
            is clamped to [-30, 20] as diffusers does.
        sample: draw from the posterior with the global generator, or take its mode.
        temperature: factor on the posterior's standard deviation; 1 is the posterior itself.

    Returns:
        z, (B, d, h, w), and the KL to N(0, I) in closed form (arXiv:1312.6114, appendix B), (B,),
        nats per image: 0.5 * sum(mean^2 + var - 1 - logvar).
    """
    posterior = DiagonalGaussianDistribution(moments.float())
    kl = posterior.kl()
    if not sample:
        return posterior.mode(), kl
    return posterior.mean + temperature * (posterior.sample() - posterior.mean), kl
