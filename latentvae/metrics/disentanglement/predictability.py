"""Compute the separated attribute predictability of a code (SAP, Kumar et al. 2017).

Paper: https://arxiv.org/abs/1711.00848. Each dimension alone predicts each factor by a linear
model. For each factor, the score of the second best dimension is subtracted from the score of the
best dimension. The SAP score is the mean of these differences over factors.

`N` images, `D` dimensions of the code, `F` factors.
"""

import warnings
from collections.abc import Collection

import numpy as np

from latentvae.metrics.disentanglement.codes import (
    check_categorical,
    check_codes,
    split_rows,
    standardised,
    top_gap,
)

SVM_C = 0.01  # weight of the error in the support vector machine, as in disentanglement_lib


def sap(
    codes: np.ndarray,
    factors: np.ndarray,
    *,
    categorical: Collection[int],
    test_share: float = 1 / 3,
    seed: int = 0,
) -> float:
    """Return the separated attribute predictability, from 0 to 1.

    Args:
        codes: (N, D), one code per image.
        factors: (N, F), integers, the true factors of the images.
        categorical: indices of the factors whose values have no order. A linear support vector
            machine predicts these factors, and the score is its accuracy on test rows. All other
            factors are predicted by linear regression, and the score is R^2 on all rows. The study
            of disentanglement_lib treats all factors as categorical (`range(F)`). A linear support
            vector machine cannot separate many ordered values by one dimension, so scores with
            `range(F)` are low even for a perfect code.
        test_share: share of the rows on which the support vector machines are tested.
        seed: seed of the split.

    Raises:
        UserError: codes or factors are invalid (see `check_codes`), an index in `categorical` is
            wrong, `test_share` leaves no row for learning or none for testing, or a categorical
            factor has one value only in the rows for learning.
    """
    scores = predictability(
        codes, factors, categorical=categorical, test_share=test_share, seed=seed
    )

    return float(top_gap(scores).mean())


def predictability(
    codes: np.ndarray,
    factors: np.ndarray,
    *,
    categorical: Collection[int],
    test_share: float = 1 / 3,
    seed: int = 0,
) -> np.ndarray:
    """Return how well each dimension alone predicts each factor, (D, F).

    For the arguments, see `sap`.

    The support vector machines see standardised codes, so that the scale of a code does not change
    the score. The library disentanglement_lib does not standardise the codes.
    """
    codes, factors = check_codes(codes, factors)
    categorical = check_categorical(categorical, factors.shape[1])
    codes = standardised(codes)
    train, test = split_rows(factors, categorical=categorical, test_share=test_share, seed=seed)

    scores = codes.T @ standardised(factors.astype(np.float64)) / len(codes)  # correlations
    scores = scores**2
    for f in categorical:
        for d in range(codes.shape[1]):
            scores[d, f] = _accuracy(codes[:, d], factors[:, f], train, test)
    return scores


def _accuracy(code: np.ndarray, factor: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Return the accuracy on test rows of a linear support vector machine on one dimension."""
    from sklearn.exceptions import ConvergenceWarning  # importing it takes a second
    from sklearn.svm import LinearSVC

    model = LinearSVC(C=SVM_C, class_weight="balanced", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(code[train, None], factor[train])
    return float(np.mean(model.predict(code[test, None]) == factor[test]))
