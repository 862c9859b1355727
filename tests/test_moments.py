"""Running moments against torch's and numpy's of all rows together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from latentvae import moments as module
from latentvae.moments import RunningMoments


@pytest.fixture
def rows() -> Tensor:
    """Features of different width, far from zero: sums of squares would cancel."""
    noise = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * torch.tensor([1.0, 1e-3, 5, 2, 1, 1]) + 1e5


def collect(*batches: Tensor, covariance: bool = False) -> RunningMoments:
    moments = RunningMoments(covariance=covariance)
    for batch in batches:
        moments.update(batch)
    return moments


@pytest.mark.parametrize("covariance", [False, True])
def test_batches_are_all_rows_together(rows: Tensor, covariance: bool) -> None:
    moments = collect(*rows.split([1, 7, 30, 12]), covariance=covariance)
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.variance(), rows.var(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.std(correction=0), rows.std(0, correction=0))


def test_covariance_is_numpys(rows: Tensor) -> None:
    expected = torch.from_numpy(np.cov((rows - 1e5).numpy(), rowvar=False))
    found = collect(*rows.split([1, 7, 30, 12]), covariance=True).covariance()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("covariance", [False, True])
def test_joined_parts_are_one_pass(rows: Tensor, covariance: bool) -> None:
    a, b = (collect(part, covariance=covariance) for part in rows.split(31))
    before = b.scatter.clone()
    total = RunningMoments(covariance=covariance)
    for part in (RunningMoments(6, covariance=covariance), b, a):
        total.join(part)
    whole = collect(rows, covariance=covariance)
    assert total.count == 50
    torch.testing.assert_close(total.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(total.scatter, whole.scatter, rtol=1e-6, atol=1e-7)
    assert torch.equal(b.scatter, before)


def test_ranks_are_joined_in_order(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = (collect(part) for part in rows.split(31))
    monkeypatch.setattr(module, "gather_objects", lambda state: [state, other.state_dict()])
    joined = mine.joined()
    mine.join(other)
    assert joined.count == 50
    assert torch.equal(joined.mean, mine.mean) and torch.equal(joined.scatter, mine.scatter)


def test_axis_names_the_features(rows: Tensor) -> None:
    maps = rows.view(2, 5, 5, 6).movedim(3, 1)  # (B, D, h, w)
    moments = RunningMoments(6)
    moments.update(maps.float(), axis=1)
    torch.testing.assert_close(moments.mean, maps.float().double().mean((0, 2, 3)))
    assert moments.count == 50


def test_pooled_groups_are_one_feature_each(rows: Tensor) -> None:
    pooled = collect(*rows.split(9)).pooled(2)
    groups = rows.view(50, 2, 3).transpose(0, 1).flatten(1)
    assert pooled.count == 150
    torch.testing.assert_close(pooled.mean, groups.mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(pooled.variance(), groups.var(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("seen", [0, 20])
def test_continues_exactly(rows: Tensor, covariance: bool, seen: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "state.npz", **collect(rows[:seen], covariance=covariance).state_dict())
    resumed = RunningMoments(covariance=covariance)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        resumed.load_state_dict(dict(state))
    resumed.update(rows[seen:])
    expected = collect(rows[:seen], rows[seen:], covariance=covariance)
    assert torch.equal(resumed.scatter, expected.scatter)
    assert torch.equal(resumed.mean, expected.mean)


def test_sums_have_the_precision_that_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have no float64; the device itself is not needed to see the dtype."""
    monkeypatch.setattr(Tensor, "to", lambda self, *_: self)
    assert RunningMoments(2, device="mps").mean.dtype == torch.float32
    assert RunningMoments(2, device="cpu").mean.dtype == torch.float64


def test_too_few_rows_and_wrong_features_are_errors(rows: Tensor) -> None:
    with pytest.raises(ValueError, match=r"at least 2 observations \(got 1\)"):
        collect(rows[:1]).variance()
    assert collect(rows[:1]).variance(correction=0).tolist() == [0.0] * 6
    with pytest.raises(ValueError, match=r"at least 1 observations \(got 0\)"):
        collect(rows[:0]).variance(correction=0)
    with pytest.raises(ValueError, match="of 6 features cannot add observations of 5"):
        collect(rows, rows[:, :5])
    with pytest.raises(ValueError, match="covariance=True"):
        collect(rows).covariance()
