"""Check codes and factors, and split them into rows for learning and rows for testing."""

from collections.abc import Collection

import numpy as np

from latentvae.errors import UserError


def check_codes(codes: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes (N, D) as float64 and factors (N, F) as int64.

    Raises:
        UserError: a shape or type is wrong, a code is not finite, or a factor has one value only.
    """
    codes, factors = np.asarray(codes), np.asarray(factors)
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors) or 0 in codes.shape:
        raise UserError(
            "codes must be (N, D) and factors (N, F), with one row for each of the same N images "
            f"(got {codes.shape} and {factors.shape})."
        )
    if factors.dtype.kind not in "iub":
        raise UserError(f"factors must be integers (got {factors.dtype}). Number their values.")
    if not np.isfinite(codes).all():
        raise UserError("codes must be finite, but some are infinite or NaN.")
    for number, column in enumerate(factors.T):
        if (column == column[0]).all():
            raise UserError(
                f"factor {number} has the value {column[0]} in all {len(column)} rows, so no "
                "score can measure it. Leave the column of this factor out."
            )
    return codes.astype(np.float64), factors.astype(np.int64)


def check_categorical(categorical: Collection[int], num_factors: int) -> set[int]:
    """Return the set of indices of the categorical factors, whose values have no order.

    Raises:
        UserError: an index is not in the range 0 to `num_factors` - 1.
    """
    wrong = [number for number in categorical if not 0 <= number < num_factors]
    if wrong:
        raise UserError(
            f"categorical must hold indices of factors, 0 to {num_factors - 1} (got {wrong[0]})."
        )
    return set(categorical)


def split_rows(
    factors: np.ndarray, *, categorical: Collection[int], test_share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the rows for learning and of the rows for testing, drawn at random.

    Args:
        factors: (N, F).
        categorical: indices of the factors that need two values or more in the rows for learning.
        test_share: share of the rows for testing.
        seed: seed of the draw.

    Raises:
        UserError: one of the two sets would be empty, or a categorical factor has one value only in
            the rows for learning.
    """
    count = len(factors)
    held_out = round(count * test_share)
    if not 0 < held_out < count:
        raise UserError(
            f"test_share {test_share:g} of {count} rows leaves no row for learning or none for "
            "testing. Give more rows, or a share such as 0.33."
        )
    order = np.random.default_rng(seed).permutation(count)
    train, test = order[held_out:], order[:held_out]

    for number in sorted(categorical):
        if len(values := np.unique(factors[train, number])) < 2:
            raise UserError(
                f"factor {number} has the value {values[0]} in all {len(train)} rows for learning, "
                "so its classes cannot be learned. Give more rows with other values, or leave the "
                "column of this factor out."
            )
    return train, test


def standardised(codes: np.ndarray) -> np.ndarray:
    """Return codes with mean 0 and standard deviation 1 in each dimension.

    Constant dimensions become 0.
    """
    std = codes.std(0)
    return (codes - codes.mean(0)) / np.where(std > 0, std, 1.0)


def top_gap(scores: np.ndarray) -> np.ndarray:
    """Return each factor's best score minus its second best score, (F,).

    `scores` holds the score of each dimension for each factor, (D, F). With only one dimension, the
    second best score is 0.
    """
    ranked = np.sort(np.vstack([scores, np.zeros(scores.shape[1])]), axis=0)
    return ranked[-1] - (ranked[-2] if len(scores) > 1 else 0.0)
