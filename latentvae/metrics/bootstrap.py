"""A mean over images and the interval that says how far it can be trusted, in constant memory.

The interval is the Poisson bootstrap's: instead of drawing n of n images, a resample gives each
image a weight from Poisson(1), so that images may stream by and their number need not be known
(Hanley and MacGibbon 2006, https://doi.org/10.1016/j.cmpb.2006.04.006; Chamandy et al. 2012,
https://research.google/pubs/estimating-uncertainty-for-massive-data-streams/).
"""

import math
from functools import lru_cache
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
SEED = 0


class Interval(TypedDict):
    """A mean over images, its 95 % bootstrap interval, over how many images, and how many of them
    had an infinite value, which is left out of the mean. One value has no interval."""

    mean: float
    ci95: list[float] | None
    images: int
    infinite: int


@lru_cache(maxsize=64)  # 1 MB: the accumulators of all metrics share the weights of a batch
def resample_weights(index: int) -> NDArray[np.float64]:
    """How often each resample drew the image of this index, (2000,), read-only.

    It depends on the index alone, so all models and metrics measured on the same images are
    resampled alike.
    """
    draws = np.random.default_rng((SEED, index))
    weights = draws.poisson(1.0, NUM_RESAMPLES).astype(np.float64)
    weights.setflags(write=False)
    return weights


class BootstrapMean:
    """Running mean of one value per image with its 95 % percentile interval (2,000 resamples).

    Equal images have an infinite PSNR: such values are counted, not averaged.

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
        """Take in an image's value.

        Args:
            value: any number or +inf.
            index: of the image in its data set, from 0; each at most once.
        """
        if math.isnan(value) or value == -math.inf:
            raise ValueError(f"the value of image {index} is {value}; it must be a number or +inf")
        if value == math.inf:
            self._infinite += 1
            return
        weights = resample_weights(index)
        self._finite += 1
        self._weights += weights
        # Running means, not sums: equal values stay exactly what they are.
        self._mean += (value - self._mean) / self._finite
        share = np.divide(weights, self._weights, out=np.zeros_like(weights), where=weights > 0)
        self._means += share * (value - self._means)

    def result(self) -> Interval:
        """Mean and interval of the finite values; infinity where there are only infinite ones."""
        if self._finite + self._infinite == 0:
            raise ValueError("a mean needs at least one value")
        mean, low, high = (self._mean, *self._percentiles()) if self._finite else (math.inf,) * 3
        return {
            "mean": mean,
            "ci95": [low, high] if (self._finite or self._infinite) > 1 else None,
            "images": self._finite + self._infinite,
            "infinite": self._infinite,
        }

    def _percentiles(self) -> tuple[float, float]:
        drawn = self._means[self._weights > 0]  # of few images a resample may have drawn none
        low, high = np.percentile(drawn, [2.5, 97.5])
        return float(low), float(high)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "finite": np.asarray(self._finite),
            "infinite": np.asarray(self._infinite),
            "mean": np.asarray(self._mean),
            "weights": self._weights.copy(),
            "means": self._means.copy(),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._finite, self._infinite = int(state["finite"]), int(state["infinite"])
        self._mean = float(state["mean"])
        self._weights, self._means = state["weights"].copy(), state["means"].copy()
