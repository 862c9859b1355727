"""The streamed mean and its interval against the bootstrap that draws images, and closed forms."""

import math

import numpy as np
import pytest

from latentvae.metrics.bootstrap import NUM_RESAMPLES, BootstrapMean, resample_weights


def collect(values, *, first: int = 0) -> BootstrapMean:
    mean = BootstrapMean()
    for i, value in enumerate(values):
        mean.update(float(value), index=first + i)
    return mean


@pytest.fixture
def values() -> np.ndarray:
    """Skewed, so that the interval is not symmetric."""
    return np.random.default_rng(1).gamma(2.0, 3.0, size=200)


def test_matches_the_bootstrap_that_draws_images(values: np.ndarray) -> None:
    draws = np.random.default_rng(2).integers(200, size=(10_000, 200))
    expected = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    result = collect(values).result()
    width = expected[1] - expected[0]
    assert result["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert result["ci95"] == pytest.approx(expected, abs=0.06 * width)
    assert (result["images"], result["infinite"]) == (200, 0)


def test_is_the_weighted_mean_of_each_resample(values: np.ndarray) -> None:
    weights = np.stack([resample_weights(i) for i in range(200)])
    means = (weights * values[:, None]).sum(axis=0) / weights.sum(axis=0)
    expected = np.percentile(means, [2.5, 97.5])
    assert collect(values).result()["ci95"] == pytest.approx(expected, rel=1e-12)


def test_weights_are_poisson_of_mean_1_and_independent_over_images() -> None:
    weights = np.stack([resample_weights(i) for i in range(100)])
    n = weights.size
    assert weights.mean() == pytest.approx(1, abs=4 / math.sqrt(n))
    for k in range(4):
        share = math.exp(-1) / math.factorial(k)
        sigma = math.sqrt(share * (1 - share) / n)
        assert (weights == k).mean() == pytest.approx(share, abs=4 * sigma)
    off_diagonal = np.corrcoef(weights)[np.triu_indices(100, k=1)]
    assert np.abs(off_diagonal).max() < 5 / math.sqrt(NUM_RESAMPLES)


def test_the_weights_of_an_image_depend_on_its_index_alone(values: np.ndarray) -> None:
    """So two models on the same images share their resamples, in whatever order they came."""
    forward, backward = collect(values), BootstrapMean()
    for i in reversed(range(200)):
        backward.update(values[i] + 5, index=i)
    shifted = [bound + 5 for bound in forward.result()["ci95"]]
    assert backward.result()["ci95"] == pytest.approx(shifted, rel=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        resample_weights(0)[0] = 2  # all accumulators share it


def test_one_image_has_no_interval_and_that_of_equal_images_no_width() -> None:
    expected = {"mean": 0.1, "ci95": None, "images": 1, "infinite": 0}
    assert collect([0.1], first=7).result() == expected
    assert collect([0.1, math.inf]).result()["ci95"] is None
    assert collect([0.1] * 3).result()["ci95"] == [0.1, 0.1]


def test_infinite_values_are_counted_and_left_out(values: np.ndarray) -> None:
    finite, mixed = collect(values), collect(values)
    for i in range(200, 203):
        mixed.update(math.inf, index=i)
    assert mixed.result() == {**finite.result(), "images": 203, "infinite": 3}
    expected = {"mean": math.inf, "ci95": [math.inf, math.inf], "images": 2, "infinite": 2}
    assert collect([math.inf, math.inf]).result() == expected


def test_what_is_no_value_is_refused() -> None:
    for value in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="image 4"):
            BootstrapMean().update(value, index=4)
    with pytest.raises(ValueError, match="at least one value"):
        BootstrapMean().result()


def test_continues_exactly(values: np.ndarray, tmp_path) -> None:
    values[50] = math.inf
    np.savez(tmp_path / "state.npz", **collect(values[:90]).state_dict())
    resumed = BootstrapMean()
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        resumed.load_state_dict(dict(state))
    for i in range(90, 200):
        resumed.update(values[i], index=i)
    assert resumed.result() == collect(values).result()
