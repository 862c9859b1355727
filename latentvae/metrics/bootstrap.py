"""Compute a mean over images and its confidence interval, in constant memory.

The confidence interval comes from the Poisson bootstrap. The usual bootstrap draws n of n images,
with replacement, for each resample. In the Poisson bootstrap, each resample draws a weight for each
image from Poisson(1), so the number of images need not be known in advance.

Sources: Hanley and MacGibbon 2006, https://doi.org/10.1016/j.cmpb.2006.04.006, and Chamandy et al.
2012, https://research.google/pubs/estimating-uncertainty-for-massive-data-streams/.
"""

import math
from functools import lru_cache
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
SEED = 0


class Interval(TypedDict):
    """A mean over images with its 95 % confidence interval.

    Attributes:
        mean: mean of the finite values, or infinity if all values are infinite.
        ci95: 95 % bootstrap interval of the mean. None if the mean is of a single value.
        images: number of images.
        infinite: number of images with an infinite value, which the mean leaves out.
    """

    mean: float
    ci95: list[float] | None
    images: int
    infinite: int


@lru_cache(maxsize=64)  # 1 MB. All metrics of an image use the same weights.
def resample_weights(index: int) -> NDArray[np.float64]:
    """Return how often each bootstrap resample draws image number `index`, (2000,), read-only.

    The weights depend only on the index. So all models and metrics that are measured on the same
    images have the same resamples.
    """
    draws = np.random.default_rng((SEED, index))
    weights = draws.poisson(1.0, NUM_RESAMPLES).astype(np.float64)
    weights.setflags(write=False)
    return weights


class BootstrapMean:
    """Computes the mean of one value per image, with its 95 % confidence interval.

    The interval holds the middle 95 % of the means of 2,000 bootstrap resamples. Infinite values,
    such as the PSNR of equal images, are counted, but the mean leaves them out.

        psnr = BootstrapMean()
        psnr.update(31.4, index=0)  # once per image, in any order
        psnr.result()["ci95"]
    """

    def __init__(self) -> None:
        self._finite = 0
        self._infinite = 0
        self._mean = 0.0
        self._weights = np.zeros(NUM_RESAMPLES)  # total weight of each resample
        self._means = np.zeros(NUM_RESAMPLES)  # weighted mean of each resample

    def update(self, value: float, *, index: int) -> None:
        """Add an image's value.

        Args:
            value: a finite number or +inf.
            index: position of the image in its data set, from 0. Use each index at most once.
        """
        if math.isnan(value) or value == -math.inf:
            raise ValueError(
                f"The value of image {index} must be a finite number or +inf (got {value})."
            )
        if value == math.inf:
            self._infinite += 1
            return
        weights = resample_weights(index)
        self._finite += 1
        self._weights += weights
        # Running means instead of sums keep a mean of equal values exact.
        self._mean += (value - self._mean) / self._finite
        share = np.divide(weights, self._weights, out=np.zeros_like(weights), where=weights > 0)
        self._means += share * (value - self._means)

    def result(self) -> Interval:
        """Return mean and interval of the finite values, or infinity if all values are infinite."""
        if self._finite + self._infinite == 0:
            raise ValueError("A mean needs at least one value (got none).")
        mean, low, high = (self._mean, *self._percentiles()) if self._finite else (math.inf,) * 3
        return {
            "mean": mean,
            "ci95": [low, high] if (self._finite or self._infinite) > 1 else None,
            "images": self._finite + self._infinite,
            "infinite": self._infinite,
        }

    def _percentiles(self) -> tuple[float, float]:
        # With few images, a resample may have drawn none of them.
        drawn = self._means[self._weights > 0]
        low, high = np.percentile(drawn, [2.5, 97.5])
        return float(low), float(high)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return all counts, weights and means by name."""
        return {
            "finite": np.asarray(self._finite),
            "infinite": np.asarray(self._infinite),
            "mean": np.asarray(self._mean),
            "weights": self._weights.copy(),
            "means": self._means.copy(),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Set all counts, weights and means to the values that `state_dict` returned."""
        self._finite, self._infinite = int(state["finite"]), int(state["infinite"])
        self._mean = float(state["mean"])
        self._weights, self._means = state["weights"].copy(), state["means"].copy()
