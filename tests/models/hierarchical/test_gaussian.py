"""The Gaussians of a group of latents, against torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from latentvae.models.hierarchical.gaussian import (
    LOG_STD,
    MAX_LOG_STD,
    POSTERIORS,
    Gaussian,
    softplus_log_std,
)


def _gaussian(seed: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, log_std = torch.randn(2, 5, 3, generator=generator).unbind()
    return Gaussian(mean, log_std)


def _normal(gaussian: Gaussian) -> Normal:
    return Normal(gaussian.mean, gaussian.log_std.exp())


def test_kl_and_density_equal_torch_distributions():
    q, p, z = _gaussian(0), _gaussian(1), torch.randn(5, 3)
    torch.testing.assert_close(q.kl_to(p), kl_divergence(_normal(q), _normal(p)))
    torch.testing.assert_close(q.log_prob(z), _normal(q).log_prob(z))


def test_draws_have_the_scaled_standard_deviation():
    wide = Gaussian(torch.full((200_000,), 3.0), torch.full((200_000,), math.log(2.0)))
    z = wide.draw(temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert z.mean().item() == pytest.approx(3.0, abs=0.01)
    assert z.std().item() == pytest.approx(1.0, abs=0.01)
    assert (wide.draw(temperature=0.0) == 3.0).all()


def test_a_residual_posterior_is_relative_to_the_prior():
    own, prior = _gaussian(0), _gaussian(1)
    q = POSTERIORS["residual"].combine(own, prior)
    torch.testing.assert_close(q.mean, prior.mean + own.mean)
    torch.testing.assert_close(q.log_std.exp(), prior.log_std.exp() * own.log_std.exp())


def test_the_same_posterior_as_the_prior_costs_nothing():
    zeros = Gaussian(torch.zeros(5, 3), torch.zeros(5, 3))
    prior = _gaussian(1)
    assert POSTERIORS["residual"].combine(zeros, prior).kl_to(prior).abs().max() < 1e-6


def test_the_precision_posterior_is_the_product_of_two_gaussians():
    own, prior = _gaussian(0), _gaussian(1)
    q = POSTERIORS["precision"].combine(own, prior)
    z = torch.linspace(-2, 2, 7)[:, None, None]
    difference = q.log_prob(z) - own.log_prob(z) - prior.log_prob(z)
    torch.testing.assert_close(
        difference, difference[:1].expand_as(difference), rtol=1e-4, atol=1e-4
    )


def test_softplus_gives_one_at_zero_and_a_small_gradient():
    raw = torch.tensor([-4.0, 0.0, 4.0], requires_grad=True)
    std = softplus_log_std(raw).exp()
    std.sum().backward()
    assert std[1].item() == pytest.approx(1.0, abs=1e-6)
    # d std / d raw = sigmoid(beta raw), with beta = ln 2
    torch.testing.assert_close(raw.grad, torch.sigmoid(math.log(2.0) * raw.detach()))


@pytest.mark.parametrize("name", LOG_STD)
def test_extreme_outputs_stay_finite_and_nan_stays_nan(name: str):
    raw = torch.tensor([-1e6, -100.0, 0.0, 100.0, 1e6], requires_grad=True)
    log_std = LOG_STD[name](raw)
    p, q = Gaussian(torch.zeros(5), log_std), Gaussian(torch.full((5,), 10.0), log_std.flip(0))
    total = q.kl_to(p).sum() + q.log_prob(torch.zeros(5)).sum()
    total.backward()
    assert log_std.abs().max() <= MAX_LOG_STD + 1e-3
    assert total.isfinite() and raw.grad is not None and raw.grad.isfinite().all()
    assert LOG_STD[name](torch.tensor([float("nan")])).isnan().all()
