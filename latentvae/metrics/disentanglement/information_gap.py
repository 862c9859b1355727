"""Compute the mutual information gap of a code (MIG, Chen et al. 2018, arXiv:1802.04942).

For each factor, the two dimensions with the most information about the factor are compared. The
difference between their mutual information with the factor is divided by the factor's entropy. The
MIG is the mean of this quotient over factors.

Chen et al. integrate over the posteriors. We count the means of the posteriors in 20 bins of equal
width, as disentanglement_lib does (Locatello et al. 2019, arXiv:1811.12359).

`N` images, `D` dimensions of the code, `F` factors.
"""

import numpy as np

from latentvae.metrics.disentanglement.codes import check_codes, top_gap


def mig(codes: np.ndarray, factors: np.ndarray, *, bins: int = 20) -> float:
    """Return the mutual information gap, from 0 to 1.

    With few images, the estimated mutual information is too large, so use 10,000 images or more.
    For codes of pure noise and a factor with V values, the estimate of the mutual information is
    about (bins - 1) (V - 1) / (2 N) nats instead of 0.

    Args:
        codes: (N, D), one code per image.
        factors: (N, F), integers, the true factors of the images.
        bins: number of bins of equal width between the smallest and the largest value of a
            dimension.

    Raises:
        UserError: codes or factors are invalid, see `check_codes`.
    """
    codes, factors = check_codes(codes, factors)
    entropies = np.array([_entropy(np.unique(f, return_counts=True)[1]) for f in factors.T])
    return float((top_gap(mutual_information(codes, factors, bins=bins)) / entropies).mean())


def mutual_information(codes: np.ndarray, factors: np.ndarray, *, bins: int = 20) -> np.ndarray:
    """Return the mutual information of each dimension with each factor: (D, F), nats."""
    codes, factors = check_codes(codes, factors)
    binned = [_bin_numbers(dimension, bins) for dimension in codes.T]
    values = [np.unique(factor, return_inverse=True)[1] for factor in factors.T]
    return np.array([[_information(b, v) for v in values] for b in binned])


def _bin_numbers(values: np.ndarray, bins: int) -> np.ndarray:
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros(len(values), dtype=np.int64)
    return np.minimum((values - low) / (high - low) * bins, bins - 1).astype(np.int64)


def _information(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mutual information of two columns of small integers, in nats."""
    counts = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(counts, (first, second), 1)
    return _entropy(counts.sum(1)) + _entropy(counts.sum(0)) - _entropy(counts.ravel())


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
