"""Compute paired differences of two models on the same images, from per_image.csv.

A metric differs much more between images than between models. So the confidence intervals of two
models may overlap, although one model is better on almost every image. This module computes the
difference on each image, and returns its mean with a 95 % interval (Poisson bootstrap over images).
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentvae.errors import UserError
from latentvae.report.schema import IMAGE_COLUMNS
from latentvae.text import spreadsheet_text

NUM_RESAMPLES = 2000
CHUNK = 1000  # number of images whose bootstrap weights are in memory at the same time

Values = dict[str, float]
"""A metric's values by the names of the images."""


@dataclass(frozen=True)
class Difference:
    """Mean of a paired difference with its 95 % interval (low, high), over `images` images."""

    mean: float
    low: float
    high: float
    images: int

    @property
    def is_clear(self) -> bool:
        """Whether 0 is outside the 95 % interval."""
        return self.low > 0 or self.high < 0


def read_values(folder: Path) -> dict[str, dict[str, Values]]:
    """Return the values of per_image.csv by model and metric, or {} if there is no such file."""
    path = folder / "per_image.csv"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Values]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["kind"] == "model":
                    of_model = found.setdefault(row["coder"], {})
                    for metric in IMAGE_COLUMNS:
                        if row.get(metric):
                            of_model.setdefault(metric, {})[row["image"]] = float(row[metric])
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise UserError(f"'{path}' is not a table of `latentvae evaluate`: {error}.") from error
    return found


def values_of(values: Mapping[str, dict[str, Values]], model: str) -> dict[str, Values]:
    """Return a model's values by metric. `model` is the model's name in the report."""
    return values.get(spreadsheet_text(model), {})


def paired_difference(first: Values, second: Values) -> Difference | None:
    """Return the mean of `second` minus `first`, over the images with values in both.

    An image with an infinite PSNR (an exact copy) is left out. The result is None if fewer than two
    images remain.
    """
    names = [name for name in first if name in second]
    pairs = np.array([(first[name], second[name]) for name in names]).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) < 2:
        return None
    differences = pairs[:, 1] - pairs[:, 0]

    # In each resample of the bootstrap, an image counts Poisson(1) times.
    rng = np.random.default_rng(0)
    sums, weights = np.zeros(NUM_RESAMPLES), np.zeros(NUM_RESAMPLES)
    for start in range(0, len(differences), CHUNK):
        part = differences[start : start + CHUNK]
        drawn = rng.poisson(1.0, (NUM_RESAMPLES, len(part)))
        sums += drawn @ part
        weights += drawn.sum(axis=1)
    means = sums[weights > 0] / weights[weights > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    mean = math.fsum(differences) / len(differences)
    return Difference(mean, float(low), float(high), len(differences))
