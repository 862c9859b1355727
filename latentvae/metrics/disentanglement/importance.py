"""Compute disentanglement, completeness and informativeness of a code (DCI).

Source: Eastwood and Williams 2018, https://openreview.net/forum?id=By-7dz-AZ. A model predicts each
factor from all dimensions of the code, and measures how important each dimension is for the
prediction. The models are gradient boosted trees with scikit-learn's defaults, as in
disentanglement_lib (arXiv:1811.12359).

`N` images, `D` dimensions of the code, `F` factors.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from latentvae.errors import UserError
from latentvae.metrics.disentanglement.codes import check_categorical, check_codes, split_rows


@dataclass(frozen=True)
class DCI:
    """The three scores of `dci`, each from 0 to 1, and what they are computed from.

    Attributes:
        disentanglement: high if each dimension is important for only one factor.
        completeness: high if only one dimension is important for each factor.
        informativeness: how well the factors of test rows can be predicted from the code.
        importance: (D, F), importance of each dimension for each factor. Each column sums to 1, or
            to 0 if the factor of this column could not be predicted.
        informativeness_per_factor: (F,), accuracy of categorical factors and R^2 of all other
            factors. A negative R^2 counts as 0.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: np.ndarray
    informativeness_per_factor: np.ndarray


def dci(
    codes: np.ndarray,
    factors: np.ndarray,
    *,
    categorical: Collection[int],
    test_share: float = 1 / 3,
    seed: int = 0,
) -> DCI:
    """Return disentanglement, completeness and informativeness.

    10,000 images and 10 dimensions take about a minute with one categorical factor of three values
    and four ordered factors.

    Args:
        codes: (N, D), one code per image, D at least 2.
        factors: (N, F), integers, the true factors of the images, F at least 2.
        categorical: indices of the factors whose values have no order. Classification trees predict
            these factors, and the score is the accuracy. All other factors are predicted by
            regression trees, and the score is R^2. The library disentanglement_lib treats all
            factors as categorical (`range(F)`). Classification takes much longer than regression,
            because each value of a factor needs trees of its own.
        test_share: share of the rows on which informativeness is measured.
        seed: seed of the split and of the trees.

    Raises:
        UserError: codes or factors are invalid (see `check_codes`), there is only one dimension or
            one factor, or an index in `categorical` is wrong. The error is also raised if
            `test_share` leaves no row for learning or none for testing, or if a categorical factor
            has one value only in the rows for learning.
    """
    codes, factors = check_codes(codes, factors)
    if codes.shape[1] < 2 or factors.shape[1] < 2:
        raise UserError(
            "dci needs codes of at least two dimensions and at least two factors (got "
            f"{codes.shape[1]} and {factors.shape[1]})."
        )
    categorical = check_categorical(categorical, factors.shape[1])
    rows = split_rows(factors, categorical=categorical, test_share=test_share, seed=seed)

    fitted = [
        _fit(codes, factor, *rows, categorical=number in categorical, seed=seed)
        for number, factor in enumerate(factors.T)
    ]
    importance = np.stack([columns for columns, _ in fitted], axis=1)  # (D, F)
    informativeness = np.array([score for _, score in fitted])
    return DCI(
        disentanglement=concentration(importance),
        completeness=concentration(importance.T),
        informativeness=float(informativeness.mean()),
        importance=importance,
        informativeness_per_factor=informativeness,
    )


def concentration(importance: np.ndarray) -> float:
    """Return how much the rows of a matrix are each concentrated in one column, from 0 to 1.

    The value of a row is 1 - H / log(columns), where `columns` is the number of columns. To compute
    the entropy H, the numbers of the row are first divided by their sum. The result is the mean of
    the rows' values. Rows are weighted by their sums, so a row of zeros has no weight. A matrix of
    zeros gives 0.
    """
    sums = importance.sum(1)
    if not sums.any():
        return 0.0
    share = importance / np.where(sums > 0, sums, 1.0)[:, None]
    logs = np.log(np.where(share > 0, share, 1.0))
    entropy = -(share * logs).sum(1) / np.log(importance.shape[1])
    return float(((1 - entropy) * sums).sum() / sums.sum())


def _fit(
    codes: np.ndarray,
    factor: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    *,
    categorical: bool,
    seed: int,
) -> tuple[np.ndarray, float]:
    """Return the importance of each dimension for one factor (D,), and the score on test rows."""
    from sklearn.ensemble import (  # importing it takes a second
        GradientBoostingClassifier,
        GradientBoostingRegressor,
    )

    kind = GradientBoostingClassifier if categorical else GradientBoostingRegressor
    model = kind(random_state=seed).fit(codes[train], factor[train])
    score = model.score(codes[test], factor[test])  # accuracy, or R^2
    return np.asarray(model.feature_importances_), max(float(score), 0.0)
