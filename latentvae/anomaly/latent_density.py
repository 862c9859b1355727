"""Fit a density of feature vectors, such as latents: a Gaussian mixture or nearest neighbours."""

from typing import Any, Protocol

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from latentvae.anomaly.checks import check_choice, check_count, check_range
from latentvae.anomaly.detector import Detector
from latentvae.anomaly.mixture import Mixture, check_rows_for_components
from latentvae.anomaly.training import in_batches
from latentvae.errors import UserError


class Density(Protocol):
    """A fitted density, which scores rows and can be stored as tensors."""

    def anomaly_scores(self, rows: np.ndarray) -> np.ndarray: ...

    def tensors(self) -> dict[str, Tensor]: ...


class MixtureDensity:
    """Scores rows by their energy, the -log density in nats, under a Gaussian mixture."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    @classmethod
    def fit(cls, rows: np.ndarray, options: "LatentDensity", seed: int) -> "MixtureDensity":
        """Fit the mixture by EM with scikit-learn."""
        check_rows_for_components(len(rows), options.num_components)
        fitted = GaussianMixture(
            options.num_components, reg_covar=options.variance_floor, random_state=seed
        ).fit(rows)
        weights, means, covariances = map(
            torch.from_numpy, (fitted.weights_, fitted.means_, fitted.covariances_)
        )
        return cls(Mixture(weights.log(), means, torch.linalg.cholesky(covariances)))

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], options: "LatentDensity") -> "MixtureDensity":
        """Build the density from stored tensors."""
        return cls(Mixture(**tensors))

    def anomaly_scores(self, rows: np.ndarray) -> np.ndarray:
        """Return -log p(row) of each of N rows, in nats, (N,)."""
        return in_batches(rows, self.mixture.energy).numpy()

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters of the mixture."""
        return dict(vars(self.mixture))


class NeighbourDensity:
    """Scores rows by their mean distance to the `num_neighbours` nearest training rows."""

    def __init__(self, rows: np.ndarray, num_neighbours: int) -> None:
        self.rows, self.num_neighbours = rows, num_neighbours
        self.index = NearestNeighbors(n_neighbors=num_neighbours).fit(rows)

    @classmethod
    def fit(cls, rows: np.ndarray, options: "LatentDensity", seed: int) -> "NeighbourDensity":
        """Keep the training rows."""
        if len(rows) < options.num_neighbours:
            raise UserError(
                f"{len(rows)} sample(s) are too few for num_neighbours={options.num_neighbours}: "
                "give more rows, or lower num_neighbours."
            )
        return cls(rows, options.num_neighbours)

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], options: "LatentDensity") -> "NeighbourDensity":
        """Build the density from stored tensors."""
        return cls(tensors["rows"].numpy(), options.num_neighbours)

    def anomaly_scores(self, rows: np.ndarray) -> np.ndarray:
        """Return the mean distance of each of N rows to its nearest training rows, (N,)."""
        return self.index.kneighbors(rows)[0].mean(axis=1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the training rows."""
        return {"rows": torch.from_numpy(self.rows)}


DENSITIES: dict[str, type[MixtureDensity] | type[NeighbourDensity]] = {
    "gmm": MixtureDensity,
    "knn": NeighbourDensity,
}


class LatentDensity(Detector):
    """Detector of anomalous rows, by a density of features such as the latents of a network.

        latents = VAEDetector().fit(clean).latents(clean)
        detector = LatentDensity(density="knn").fit(latents)

    Args:
        density: "gmm" scores rows by their energy (-log density) under a Gaussian mixture, in nats.
            "knn" scores rows by their mean distance to the nearest training rows.
        num_components: number of components of "gmm".
        variance_floor: variance added to each diagonal element of the covariances of "gmm", in
            squared units of the scaled columns.
        num_neighbours: number of neighbours of "knn".
        scaling: how columns are scaled, by the training rows: "standard" (mean 0, variance 1),
            "minmax" ([0, 1]) or "none".
        constant_columns: "error" rejects columns with only one value in the training rows, and
            "keep" allows them.
        false_alarm_rate: allowed share of clean (normal) rows that are flagged as anomalies.
        random_state: seed, NumPy RandomState, or None for a new seed in each `fit`.

    Attributes:
        density_: the fitted density.

    With "knn", each training row is a neighbour of itself. So training rows get lower anomaly
    scores than new rows. Call `calibrate` with held-out rows for a threshold that keeps the
    false-alarm rate.
    """

    def __init__(
        self,
        *,
        density: str = "gmm",
        num_components: int = 2,
        variance_floor: float = 1e-3,
        num_neighbours: int = 5,
        scaling: str = "standard",
        constant_columns: str = "error",
        false_alarm_rate: float = 0.01,
        random_state: Any = 0,
    ) -> None:
        self.density = density
        self.num_components = num_components
        self.variance_floor = variance_floor
        self.num_neighbours = num_neighbours
        self.scaling = scaling
        self.constant_columns = constant_columns
        self.false_alarm_rate = false_alarm_rate
        self.random_state = random_state

    def _train(self, rows: np.ndarray, *, seed: int) -> None:
        check_choice("density", self.density, tuple(DENSITIES))
        for name in ("num_components", "num_neighbours"):
            check_count(name, getattr(self, name))
        check_range("variance_floor", self.variance_floor, low=0, open_low=True)
        self.density_ = DENSITIES[self.density].fit(rows, self, seed)

    def _anomaly_scores(self, rows: np.ndarray) -> np.ndarray:
        return self.density_.anomaly_scores(rows)

    def _tensors(self) -> dict[str, Tensor]:
        return self.density_.tensors()

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self.density_ = DENSITIES[self.density].restore(tensors, self)
