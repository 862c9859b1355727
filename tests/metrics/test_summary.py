"""The mean and its bootstrap interval."""

import numpy as np
import pytest

from latentvae.metrics import mean_and_ci95


def test_interval_is_that_of_the_normal_law_for_many_values() -> None:
    values = np.random.default_rng(1).normal(30, 4, size=400)
    summary = mean_and_ci95(list(values))
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert summary["mean"] == pytest.approx(values.mean())
    assert summary["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.05)
    assert summary["images"] == 400


def test_same_values_same_interval() -> None:
    assert mean_and_ci95([1.0, 2.0, 4.0]) == mean_and_ci95([1.0, 2.0, 4.0])


def test_one_value_has_no_width() -> None:
    assert mean_and_ci95([3.0]) == {"mean": 3.0, "ci95": [3.0, 3.0], "images": 1}


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        mean_and_ci95([])
