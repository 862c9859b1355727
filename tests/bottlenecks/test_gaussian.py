import math

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from latentvae.bottlenecks.gaussian import GaussianBottleneck

POSTERIOR = GaussianBottleneck(latent_channels=4)
NARROW = GaussianBottleneck(latent_channels=2)


def test_kl_of_the_prior_is_zero() -> None:
    found = POSTERIOR(torch.zeros(2, 8, 3, 3))
    assert found.kl.tolist() == [0.0] * 2 and found.kl_per_channel.tolist() == [[0.0] * 4] * 2


def test_kl_is_torch_distributions_sum_over_latent_elements() -> None:
    mean, logvar = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    moments = torch.cat([mean, logvar], dim=1)
    found = POSTERIOR(moments)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=(2, 3))
    torch.testing.assert_close(found.kl_per_channel, expected)
    torch.testing.assert_close(found.kl, DiagonalGaussianDistribution(moments).kl())
    assert torch.equal(found.mean, mean)


def test_mode_temperature_and_sample() -> None:
    moments = torch.randn(1, 4, 2, 2)
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.equal(NARROW(moments, sample=False)[0], mean)
    torch.testing.assert_close(NARROW(moments, temperature=0.0)[0], mean)
    many = NARROW(moments.expand(20_000, -1, -1, -1), temperature=0.5)[0]
    torch.testing.assert_close(many.mean(0), mean[0], atol=0.03, rtol=0.0)
    torch.testing.assert_close(many.std(0), 0.5 * (logvar[0] / 2).exp(), atol=0.03, rtol=0.03)


def test_a_fixed_variance_replaces_the_encoders() -> None:
    fixed = GaussianBottleneck(latent_channels=2, posterior_logvar=-1.5)
    moments = torch.randn(1, 4, 2, 2, requires_grad=True)
    mean = moments[:, :2]
    many = fixed(moments.expand(20_000, -1, -1, -1))
    assert torch.equal(many.mean[0], mean[0])
    expected = kl_divergence(Normal(mean, math.exp(-0.75)), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(many.kl[0], expected)
    deviation = torch.full((2, 2, 2), math.exp(-0.75))
    torch.testing.assert_close(many.z.std(0), deviation, atol=0.0, rtol=0.03)

    (many.kl.mean() + many.z.mean()).backward()
    assert moments.grad is not None
    assert moments.grad[:, :2].all() and not moments.grad[:, 2:].any()
