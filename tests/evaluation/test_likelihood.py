"""The measure of likelihoods, on a linear-Gaussian model whose evidence is known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from latentvae.evaluation import likelihood
from latentvae.evaluation.likelihood import Sums, bits_per_dim, bounds_of, total_of
from latentvae.models.bound import Bound


class LinearGaussian(nn.Module):
    """x = W z + b + noise, z ~ N(0, I), with a posterior that is wider than the true one."""

    def __init__(self, *, width: float = 1.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image_shape, self.num_groups = (1, 2, 3), 1
        self.w, self.b, self.noise = torch.randn(6, 2).double(), torch.randn(6).double(), 0.7
        precision = torch.eye(2).double() + self.w.T @ self.w / self.noise**2
        self.covariance = torch.linalg.inv(precision)
        self.width = width

    def evidence(self, images: Tensor) -> Tensor:
        covariance = self.w @ self.w.T + self.noise**2 * torch.eye(6).double()
        return MultivariateNormal(self.b, covariance).log_prob(images.flatten(1).double())

    def forward(self, images: Tensor, *, samples: int = 1, **_: Any) -> Bound:
        x = images.flatten(1).double()
        mean = (x - self.b) @ self.w @ self.covariance / self.noise**2
        posterior = MultivariateNormal(mean, self.width**2 * self.covariance)
        prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
        z = posterior.sample((samples,))
        ratio = (posterior.log_prob(z) - prior.log_prob(z))[None]
        kl = torch.distributions.kl_divergence(posterior, prior).expand_as(ratio)
        likelihood = Normal(z @ self.w.T + self.b, self.noise).log_prob(x).sum(-1)
        return Bound(log_likelihood=likelihood, kl=kl, log_ratio=ratio)

    def posterior_means(self, images: Tensor) -> Tensor:
        return torch.stack([images.flatten(1).sum(1), torch.zeros(len(images))], dim=1)


def images() -> Tensor:
    return torch.randn(16, 1, 2, 3, generator=torch.Generator().manual_seed(4))


def measured(samples: int, **options: Any) -> Sums:
    torch.manual_seed(0)
    return bounds_of(LinearGaussian(**options), images(), samples=samples)


def test_the_bounds_rise_to_the_evidence() -> None:
    exact = LinearGaussian().evidence(images()).mean().item()
    elbo = measured(4000).elbo / 16
    # The mean over many repetitions of the bound with k samples
    torch.manual_seed(0)
    weights = LinearGaussian()(images(), samples=20_000).log_weights()
    rising = [
        (weights.unflatten(0, (-1, k)).logsumexp(1) - math.log(k)).mean().item()
        for k in (1, 5, 50, 500)
    ]
    assert elbo < exact - 0.05
    assert rising == sorted(rising) and rising[-1] < exact + 1e-3
    assert rising[0] == pytest.approx(elbo, abs=0.01)
    assert measured(200_000).importance / 16 == pytest.approx(exact, abs=1e-3)


def test_the_true_posterior_gives_the_evidence_with_one_sample() -> None:
    exact = LinearGaussian().evidence(images()).sum().item()
    assert measured(1, width=1.0).importance == pytest.approx(exact, abs=1e-4)


def test_parts_give_the_same_bound_as_all_samples_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(64)
    monkeypatch.setattr(likelihood, "MAX_PIXELS", 6 * 16 * 5)  # 5 samples at once
    seen: list[int] = []
    torch.manual_seed(0)
    parts = bounds_of(LinearGaussian(), images(), samples=64, progress=seen.append)
    assert seen == [5] * 12 + [4]
    # other draws of the same estimate
    assert parts.elbo / 16 == pytest.approx(whole.elbo / 16, abs=0.15)
    assert parts.importance / 16 == pytest.approx(whole.importance / 16, abs=0.05)


def test_sums_of_parts_are_those_of_all_images() -> None:
    torch.manual_seed(0)
    net = LinearGaussian(width=1.0)
    split = total_of(bounds_of(net, part, samples=2) for part in images().split(5))
    whole = bounds_of(net, images(), samples=2)
    assert split.images == 16 and torch.cat(split.each, dim=1).shape == (2, 16)
    assert split.importance == pytest.approx(whole.importance, abs=1e-4)
    ours, theirs = split.activity(), whole.activity()
    assert ours is not None and theirs is not None and torch.allclose(ours, theirs)
    assert split.active_units() == 1  # the second unit's mean is always 0


def test_bits_per_dimension() -> None:
    assert bits_per_dim(3 * 4 * 5 * math.log(2.0) * 2.5, (3, 4, 5)) == pytest.approx(2.5)
