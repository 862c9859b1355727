"""Compute running mean, variance and covariance over batches and processes.

The moments of two sets of observations are joined by the pairwise rule of Chan, Golub and LeVeque
1979 (http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf). Any number of batches
and processes can be joined, in any order. The result is also precise if the mean is far from zero.

Symbols: `N` observations, `D` features, `G` groups of features.
"""

import math

import numpy as np
import torch
from torch import Tensor

from latentvae.distributed import gather_objects


class RunningMoments:
    """Count, mean and variance of each feature over any number of batches.

    moments = RunningMoments(covariance=True)
    moments.update(rows)  # (N, D), any number of times
    moments.covariance()

    Args:
        num_features: number of features D. None means the number of features of the first batch.
        covariance: whether to sum the products of all pairs of features. Without `covariance`, only
            the squares of the features are summed.
        device: device of `mean` and `scatter`.

    Attributes:
        count: number of observations per feature. The count is a Python number, so updates never
            wait for a GPU.
        mean: mean of each feature, (D,).
        scatter: with `covariance`, the sum over observations x of (x - mean)(x - mean)^T, (D, D).
            Without `covariance`, the sum of (x - mean)^2, (D,).
    """

    def __init__(
        self,
        num_features: int | None = None,
        *,
        covariance: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        # Apple's GPUs have no float64.
        self._dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._device = device
        self.has_covariance = covariance
        self._start(num_features or 0)

    @classmethod
    def known(cls, count: int, mean: Tensor, scatter: Tensor) -> "RunningMoments":
        """Create moments from known values of the attributes `count`, `mean` and `scatter`."""
        result = cls(len(mean), covariance=scatter.ndim == 2, device=mean.device)
        result.count, result.mean, result.scatter = count, mean, scatter
        return result

    @property
    def num_features(self) -> int:
        return len(self.mean)

    def update(self, values: Tensor, *, axis: int = -1) -> None:
        """Add a batch of observations, detached and converted to the dtype of the sums.

        Args:
            values: a tensor of any shape and dtype.
            axis: the axis of the features. All other axes are observations.
        """
        rows = values.detach().to(self._device, self._dtype).movedim(axis, -1).flatten(0, -2)
        if len(rows) == 0:
            return
        self._fit(rows.shape[1])
        batch, total = len(rows), self.count + len(rows)
        center = rows.mean(dim=0)
        delta = center - self.mean

        if self.has_covariance:
            # The means of the batch and of the earlier observations differ. One more row of the
            # product accounts for this difference.
            step = delta * math.sqrt(self.count * batch / total)
            centered = torch.cat([rows - center, step[None]])
            self.scatter.addmm_(centered.T, centered)
        else:
            squares = rows.var(dim=0, correction=0) * batch
            self.scatter += squares + delta.square() * (self.count * batch / total)

        self.mean += delta * (batch / total)
        self.count = total

    def join(self, other: "RunningMoments") -> None:
        """Add all observations of ``other``. ``other`` itself stays the same."""
        if other.count == 0:
            return
        self._fit(other.num_features)
        total, delta = self.count + other.count, other.mean - self.mean
        step = torch.outer(delta, delta) if self.has_covariance else delta.square()
        self.scatter += other.scatter + step * (self.count * other.count / total)
        self.mean += delta * (other.count / total)
        self.count = total

    def joined(self) -> "RunningMoments":
        """Join the moments of all ranks, on the CPU. All ranks must call this method."""
        result = RunningMoments(covariance=self.has_covariance)
        for state in gather_objects(self.state_dict()):
            part = RunningMoments(covariance=self.has_covariance)
            part.load_state_dict(state)
            result.join(part)
        return result

    def pooled(self, num_groups: int = 1) -> "RunningMoments":
        """Return the moments of G groups of features, as if each group were one feature.

        Each group consists of D / G consecutive features, where D is the number of features.
        """
        mean = self.mean.view(num_groups, -1)
        squares = self._squares().view(num_groups, -1).sum(1)
        pooled = mean.mean(1)
        between = (mean - pooled[:, None]).square().sum(1) * self.count
        return self.known(self.count * mean.shape[1], pooled, squares + between)

    def variance(self, *, correction: int = 1) -> Tensor:
        """Return the variances (D,). The divisor is the count minus ``correction``."""
        return self._squares() / self._divisor(correction)

    def std(self, *, correction: int = 1) -> Tensor:
        """Return the standard deviations (D,), the square root of `variance`."""
        return self.variance(correction=correction).sqrt()

    def covariance(self, *, correction: int = 1) -> Tensor:
        """Return the covariance (D, D). The divisor is the count minus ``correction``."""
        if not self.has_covariance:
            raise ValueError("these moments have no covariance: make them with covariance=True")
        return self.scatter / self._divisor(correction)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "count": np.asarray(self.count),
            "mean": self.mean.cpu().numpy().copy(),
            "scatter": self.scatter.cpu().numpy().copy(),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.count = int(state["count"])
        self.mean, self.scatter = (
            torch.from_numpy(state[name].copy()).to(self._device, self._dtype)
            for name in ("mean", "scatter")
        )

    def _start(self, num_features: int) -> None:
        shape = (num_features,) * (1 + self.has_covariance)
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=self._dtype).to(self._device)
        self.scatter = torch.zeros(shape, dtype=self._dtype).to(self._device)

    def _fit(self, num_features: int) -> None:
        if self.count == 0 and self.num_features == 0:
            self._start(num_features)
        if num_features != self.num_features:
            raise ValueError(
                f"moments of {self.num_features} features cannot add observations of "
                f"{num_features} features"
            )

    def _squares(self) -> Tensor:
        return self.scatter.diagonal() if self.has_covariance else self.scatter

    def _divisor(self, correction: int) -> int:
        if self.count <= correction:
            raise ValueError(
                f"a variance with divisor n - {correction} needs at least {correction + 1} "
                f"observations (got {self.count})"
            )
        return self.count - correction
