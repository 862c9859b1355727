"""Define the base class of the semi-supervised classifiers: checks, and scikit-learn's methods.

    fit:      check rows and labels -> scale columns -> train
    predict:  check rows -> probabilities of the classes -> most probable class

Symbols: `N` rows, `F` columns, `K` classes.
"""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from latentvae.semi_supervised.checks import (
    check_above,
    check_choice,
    check_counts,
    checked_labels,
    checked_rows,
    seed_of,
)
from latentvae.semi_supervised.rows import LIKELIHOODS, READ_ROWS, RowImages
from latentvae.semi_supervised.training import Schedule, own_randomness


class SemiSupervisedClassifier(ClassifierMixin, BaseEstimator):
    """Base class of classifiers that learn from rows with a label and rows without a label.

    Attributes:
        classes_: the labels of the classes in ascending order, (K,).
        n_features_in_: number of columns F.
    """

    likelihood: str
    latent_units: int
    hidden_units: int
    hidden_layers: int
    epochs: int
    batch_size: int
    learning_rate: float
    bf16: bool
    classes: Any
    random_state: Any

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from rows with and without labels.

        Args:
            X: all rows, (N, F). Values must be in [0, 1] if the likelihood is `bernoulli`.
            y: label of each row, a whole number, and -1 for a row without a label, (N,).

        Raises:
            ValueError: rows, labels or options are wrong.
        """
        self._check_options()
        rows = torch.from_numpy(checked_rows(X, likelihood=self.likelihood))
        self.classes_, places = checked_labels(y, count=len(rows), classes=self.classes)
        self.n_features_in_ = rows.shape[1]

        self.rows_ = RowImages.of(rows, self.likelihood, self._image_shape())
        with own_randomness(seed_of(self.random_state)):
            self._train(rows, torch.from_numpy(places))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class for each row, (N, K)."""
        return self._by_batches(X, self._probabilities)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable label of each row, (N,)."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    @torch.no_grad()
    def _by_batches(self, X: Any, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Convert rows to images, call a function on batches of images, and return all results."""
        check_is_fitted(self, "classes_")
        rows = checked_rows(X, likelihood=self.likelihood, columns=self.n_features_in_)
        parts = torch.from_numpy(rows).split(READ_ROWS)
        return torch.cat([function(self.rows_.images(part)) for part in parts]).numpy()

    def _check_options(self) -> None:
        check_choice("likelihood", self.likelihood, LIKELIHOODS)
        check_counts(
            latent_units=self.latent_units,
            hidden_units=self.hidden_units,
            hidden_layers=self.hidden_layers,
            epochs=self.epochs,
            batch_size=self.batch_size,
        )
        check_above("learning_rate", self.learning_rate, low=0.0)

    def _image_shape(self) -> tuple[int, int, int]:
        """Return the image shape (C, H, W) into which a row of F = C H W columns is reshaped."""
        return (1, 1, self.n_features_in_)

    def _schedule(self) -> Schedule:
        return Schedule(self.epochs, self.batch_size, self.learning_rate, bf16=self.bf16)

    def _train(self, rows: Tensor, places: Tensor) -> None:
        """Train on rows (N, F) and class indices (N,), -1 for no class. torch is already seeded."""
        raise NotImplementedError  # Each classifier defines its own method.

    def _probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, K) of the classes for images (B, C, H, W)."""
        raise NotImplementedError  # Each classifier defines its own method.

    def _learned(self) -> dict[str, Tensor]:
        """Return the tensors that training learned, without those of the VAE `vae_`."""
        raise NotImplementedError  # Each classifier defines its own method.

    def _relearn(self, tensors: dict[str, Tensor]) -> None:
        """Restore the learned tensors, which `_learned` returned."""
        raise NotImplementedError  # Each classifier defines its own method.
