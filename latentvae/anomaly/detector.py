"""Define the base class of all detectors for tables, with checks, scaling and threshold.

    fit:            check rows -> scale columns -> train -> threshold from the training rows
    score_samples:  check rows -> scale columns -> score, larger is more normal

Symbols: `N` rows, `F` columns.
"""

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from latentvae.anomaly.checks import (
    check_choice,
    check_constant_columns,
    check_range,
    checked_rows,
    warn_if_rate_is_unreachable,
)

SCALINGS = ("standard", "minmax", "none")
SLACK = 1e-9  # relative distance of a threshold from the score that determines it


class Detector(OutlierMixin, BaseEstimator):
    """Base class of detectors of anomalous rows. Subclasses train on scaled rows and score them.

    Subclasses have the options `false_alarm_rate`, `scaling`, `constant_columns` and
    `random_state`, and define `_train`, `_anomaly_scores`, `_tensors` and `_restore`.

    Attributes:
        offset_: threshold of the scores of `score_samples`. Rows with a lower score are anomalies.
        n_features_in_: number of columns F.
        shift_, scale_: (F,) each. Scaled rows are (rows - shift_) / scale_.
    """

    false_alarm_rate: float
    scaling: str
    constant_columns: str
    random_state: Any
    feature_names_in_: np.ndarray  # set by scikit-learn for tables with named columns
    min_rows = 2

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn what normal rows look like.

        Args:
            X: rows without anomalies, or with few of them, (N, F).
            y: ignored.

        Raises:
            ValueError: the rows or the options are wrong.
        """
        check_range("false_alarm_rate", self.false_alarm_rate, low=0, high=0.5, open_low=True)
        rows = checked_rows(self, X, reset=True, minimum=self.min_rows)
        names = getattr(self, "feature_names_in_", None)
        check_constant_columns(rows, names, action=self.constant_columns)
        self.shift_, self.scale_ = column_scaling(rows, self.scaling)

        scaled = self._scaled(rows)
        self._train(scaled, seed=seed_of(self.random_state))
        self.offset_ = clean_threshold(-self._anomaly_scores(scaled), self.false_alarm_rate)
        return self

    def calibrate(self, X: Any, *, false_alarm_rate: float | None = None) -> Self:
        """Set the threshold from held-out rows without anomalies.

        Training rows get higher (more normal) scores than new rows. So a threshold from the
        training rows flags a larger share of new clean (normal) rows than the false-alarm rate. A
        threshold from held-out rows keeps this rate.

        Args:
            X: rows without anomalies that were not used in `fit`, (N, F).
            false_alarm_rate: allowed share of clean rows that are flagged as anomalies. With None,
                the detector's option `false_alarm_rate` is used.
        """
        rate = self.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
        check_range("false_alarm_rate", rate, low=0, high=0.5, open_low=True)
        scores = self.score_samples(X)
        warn_if_rate_is_unreachable(len(scores), rate)
        self.offset_ = clean_threshold(scores, rate)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Return how normal each row is, (N,). Larger is more normal."""
        return -self._anomaly_scores(self._checked(X))

    def decision_function(self, X: Any) -> np.ndarray:
        """Return `score_samples` minus the threshold, (N,). Negative values mean anomalies."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """Return 1 for normal rows and -1 for anomalies, (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def learned(self) -> dict[str, torch.Tensor]:
        """Return all values that `fit` and `calibrate` learned, as tensors."""
        check_is_fitted(self)
        return self._tensors() | {
            "columns.shift": torch.from_numpy(self.shift_),
            "columns.scale": torch.from_numpy(self.scale_),
            "offset": torch.tensor(self.offset_, dtype=torch.float64),
        }

    def relearn(self, tensors: dict[str, torch.Tensor]) -> Self:
        """Restore what a detector with equal options learned.

        `tensors` is the result of `learned` of that detector.
        """
        own = {"columns.shift", "columns.scale", "offset"}
        self.shift_ = tensors["columns.shift"].numpy()
        self.scale_ = tensors["columns.scale"].numpy()
        self.offset_ = tensors["offset"].item()
        self.n_features_in_ = len(self.shift_)
        self._restore({name: value for name, value in tensors.items() if name not in own})
        return self

    def _checked(self, X: Any) -> np.ndarray:
        """Check rows for a fitted detector, and return them scaled."""
        check_is_fitted(self)
        return self._scaled(checked_rows(self, X, reset=False))

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self.shift_) / self.scale_

    def _train(self, rows: np.ndarray, *, seed: int) -> None:
        """Train on scaled rows (N, F). All random numbers come from `seed`."""
        raise NotImplementedError  # Each detector defines its own method.

    def _anomaly_scores(self, rows: np.ndarray) -> np.ndarray:
        """Return the anomaly score of each scaled row, (N,). Larger is more anomalous."""
        raise NotImplementedError  # Each detector defines its own method.

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that training learned."""
        raise NotImplementedError  # Each detector defines its own method.

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the learned tensors, which `_tensors` returned."""
        raise NotImplementedError  # Each detector defines its own method.


def column_scaling(rows: np.ndarray, scaling: str) -> tuple[np.ndarray, np.ndarray]:
    """Return shift and scale of each column, each (F,). A constant column has scale 1.

    Raises:
        UserError: `scaling` is unknown.
    """
    check_choice("scaling", scaling, SCALINGS)
    if scaling == "none":
        return np.zeros(rows.shape[1]), np.ones(rows.shape[1])
    if scaling == "minmax":
        shift, scale = rows.min(axis=0), np.ptp(rows, axis=0)
    else:
        shift, scale = rows.mean(axis=0), rows.std(axis=0)
    constant = np.ptp(rows, axis=0) == 0
    return shift, np.where(constant, 1.0, scale)


def clean_threshold(scores: np.ndarray, rate: float) -> float:
    """Return the threshold for a false-alarm rate.

    The score of a new clean row is below the threshold with probability at most `rate`. Clean rows
    are rows without anomalies. The threshold comes from the conformal quantile: the
    floor(rate (n + 1))-th smallest of n scores of clean rows. If a new row has the same
    distribution as the n clean rows, all ranks of its score among the n + 1 scores are equally
    likely. If there are too few clean rows for the rate, the quantile is the smallest score, and
    the probability can be above `rate`. The threshold lies just below the quantile, so that
    rounding never flags the row whose score is the quantile.

    Args:
        scores: `score_samples` of clean rows, (n,).
        rate: false-alarm rate in (0, 0.5].
    """
    rank = max(int(rate * (len(scores) + 1)), 1)
    score = float(np.partition(scores, rank - 1)[rank - 1])
    return score - SLACK * (1 + abs(score))


def seed_of(random_state: Any) -> int:
    """Return a seed from an int, a NumPy RandomState, or None (a new seed each time)."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    return int(random_state)
