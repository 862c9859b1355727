"""Compute Gaussian mixtures with soft assignments, in float64 and with Cholesky factors.

    E(z) = -log sum_k phi_k N(z; mu_k, Sigma_k)        energy of one row, in nats

Symbols: `N` rows, `D` columns of z, `K` components. Covariances are never inverted. With the
Cholesky factor L (`Sigma = L L^T`), the log-determinant is `log |Sigma| = 2 sum log diag L`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentvae.errors import UserError

# Smallest sum of the assignments to a component. With this limit, a component without rows has
# finite parameters.
MIN_COUNT = 1e-10


@dataclass(frozen=True)
class Mixture:
    """The parameters of a Gaussian mixture, all float64.

    Attributes:
        log_weights: log phi, (K,).
        means: mu, (K, D).
        factors: lower Cholesky factors L of the covariances, (K, D, D).
    """

    log_weights: Tensor
    means: Tensor
    factors: Tensor

    def energy(self, z: Tensor) -> Tensor:
        """Return -log p(z) in nats, (N,), for rows z (N, D)."""
        offset = z.double()[None] - self.means[:, None]  # (K, N, D)
        white = torch.linalg.solve_triangular(self.factors, offset.mT, upper=False)  # (K, D, N)
        log_det = 2 * self.factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)  # (K,)

        constant = self.means.shape[1] * math.log(2 * math.pi) + log_det
        log_density = -0.5 * (white.square().sum(dim=1) + constant[:, None])  # (K, N)
        return -torch.logsumexp(self.log_weights[:, None] + log_density, dim=0)

    def detached(self) -> "Mixture":
        """Return the same mixture without an autograd graph."""
        return Mixture(self.log_weights.detach(), self.means.detach(), self.factors.detach())


def fit_mixture(z: Tensor, assignments: Tensor, *, floor: float) -> tuple[Mixture, Tensor]:
    """Return the mixture for given component probabilities of rows, and its covariances (K, D, D).

    The equations are those of DAGMM, and of the M step of the EM algorithm.

    Args:
        z: rows, (N, D).
        assignments: probability of each component for each row, (N, K). Each row sums to 1.
        floor: variance that is added to each diagonal element of the covariances. Without the
            floor, the covariance of only a few rows may be singular and have no Cholesky factor.
    """
    z, assignments = z.double(), assignments.double()
    counts = assignments.sum(dim=0).clamp_min(MIN_COUNT)  # (K,)
    means = assignments.mT @ z / counts[:, None]  # (K, D)

    offset = z[None] - means[:, None]  # (K, N, D)
    weighted = offset * (assignments.mT / counts[:, None])[..., None]
    covariances = weighted.mT @ offset  # (K, D, D)
    covariances = covariances + floor * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)

    log_weights = (counts / counts.sum()).log()
    return Mixture(log_weights, means, torch.linalg.cholesky(covariances)), covariances


def check_rows_for_components(num_rows: int, num_components: int) -> None:
    """Check that a mixture has at least two rows per component.

    Raises:
        UserError: there are fewer than two rows per component.
    """
    if num_rows < 2 * num_components:
        raise UserError(
            f"{num_rows} sample(s) are too few for num_components={num_components}: give at least "
            f"{2 * num_components} rows, two for each component, or lower num_components."
        )
