"""The mixture and its energy against scipy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

from latentvae.anomaly.mixture import Mixture, fit_mixture


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_mixture(num_components: int = 3, width: int = 4) -> Mixture:
    factors = torch.tril(rows(num_components, width, width, seed=1))
    factors.diagonal(dim1=1, dim2=2).abs_().add_(0.1)
    weights = torch.softmax(rows(num_components, seed=2), dim=0)
    return Mixture(weights.log(), rows(num_components, width, seed=3), factors)


def test_energy_is_scipys_negative_log_density() -> None:
    mixture, z = some_mixture(), rows(50, 4)
    density = sum(
        math.exp(weight) * multivariate_normal(mean.numpy(), (factor @ factor.T).numpy()).pdf(z)
        for weight, mean, factor in zip(
            mixture.log_weights, mixture.means, mixture.factors, strict=True
        )
    )
    np.testing.assert_allclose(mixture.energy(z), -np.log(density), rtol=1e-10)


def test_energy_of_far_rows_is_finite_where_the_density_is_zero() -> None:
    mixture, far = some_mixture(), 1e4 * torch.ones(1, 4).double()
    assert math.isfinite(mixture.energy(far).item()) and mixture.energy(far).item() > 1e6


def test_energy_grows_with_distance() -> None:
    """The sign: anomalies have a large energy."""
    unit = torch.eye(2, dtype=torch.float64)[None]
    mixture = Mixture(torch.zeros(1).double(), torch.zeros(1, 2).double(), unit)
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    energies = mixture.energy(z)
    assert energies[0].item() == pytest.approx(math.log(2 * math.pi))
    assert (energies.diff() > 0).all()


def test_one_m_step_is_that_of_scikit_learn() -> None:
    """Parameters from scikit-learn's assignments are scikit-learn's parameters, at convergence."""
    z = torch.cat([rows(300, 3), 3 + 0.5 * rows(200, 3, seed=5)])
    theirs = GaussianMixture(2, tol=1e-12, max_iter=500, reg_covar=1e-6, random_state=0).fit(z)
    assignments = torch.from_numpy(theirs.predict_proba(z))
    ours, covariances = fit_mixture(z, assignments, floor=1e-6)
    np.testing.assert_allclose(ours.log_weights.exp(), theirs.weights_, rtol=1e-5)
    np.testing.assert_allclose(ours.means, theirs.means_, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(covariances, theirs.covariances_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(-ours.energy(z), theirs.score_samples(z), rtol=1e-4, atol=1e-4)


def test_singular_covariances_have_a_factor() -> None:
    """Equal rows, and a component without rows: public code takes the log of a zero determinant."""
    z = torch.ones(10, 3)
    assignments = torch.zeros(10, 2)
    assignments[:, 0] = 1
    mixture, _ = fit_mixture(z, assignments, floor=1e-6)
    assert mixture.energy(z).isfinite().all()
    assert mixture.log_weights.exp()[1].item() == pytest.approx(0, abs=1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    z, logits = rows(12, 3).requires_grad_(), rows(12, 2, seed=4).requires_grad_()

    def loss(z: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        mixture, covariances = fit_mixture(z, logits.softmax(dim=1), floor=1e-3)
        penalty = covariances.diagonal(dim1=1, dim2=2).reciprocal().sum()
        return mixture.energy(z).mean() + 0.005 * penalty

    assert torch.autograd.gradcheck(loss, (z, logits))
