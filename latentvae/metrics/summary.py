"""A mean over images with the interval that says how far it can be trusted."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

NUM_RESAMPLES = 2000


class Interval(TypedDict):
    """A mean over images, its 95 % bootstrap interval, and over how many images."""

    mean: float
    ci95: list[float]
    images: int


def mean_and_ci95(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of per-image values and its percentile bootstrap interval (2,000 resamples of images).

    The draws depend on `seed` and the number of values alone, so two models measured on the same
    images are resampled alike.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"a mean needs at least one value in one dimension, not {array.shape}")
    draws = np.random.default_rng(seed)
    means = [
        array[draws.integers(len(array), size=len(array))].mean() for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "mean": float(array.mean()),
        "ci95": [float(low), float(high)],
        "images": len(array),
    }
