import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from latentvae.bottlenecks.gaussian import GaussianBottleneck

POSTERIOR = GaussianBottleneck(latent_channels=4)
NARROW = GaussianBottleneck(latent_channels=2)


def test_kl_of_the_prior_is_zero() -> None:
    kl = POSTERIOR(torch.zeros(2, 8, 3, 3)).kl
    assert kl.tolist() == [[0.0] * 4] * 2


def test_kl_is_torch_distributions_sum_over_latent_elements() -> None:
    mean, logvar = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    moments = torch.cat([mean, logvar], dim=1)
    found = POSTERIOR(moments)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=(2, 3))
    torch.testing.assert_close(found.kl, expected)
    torch.testing.assert_close(found.kl.sum(1), DiagonalGaussianDistribution(moments).kl())
    assert torch.equal(found.mean, mean)


def test_mode_temperature_and_sample() -> None:
    moments = torch.randn(1, 4, 2, 2)
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.equal(NARROW(moments, sample=False)[0], mean)
    torch.testing.assert_close(NARROW(moments, temperature=0.0)[0], mean)
    many = NARROW(moments.expand(20_000, -1, -1, -1), temperature=0.5)[0]
    torch.testing.assert_close(many.mean(0), mean[0], atol=0.03, rtol=0.0)
    torch.testing.assert_close(many.std(0), 0.5 * (logvar[0] / 2).exp(), atol=0.03, rtol=0.03)
