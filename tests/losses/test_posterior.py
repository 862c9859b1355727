import math

import pytest
import torch

from latentvae import moments
from latentvae.losses.posterior import ActiveUnits
from latentvae.moments import RunningMoments


def test_active_units_are_the_channels_whose_mean_varies() -> None:
    scales = torch.tensor([0.0, 0.05, 0.2, 3.0]).view(1, 4, 1, 1)  # variance 0, 0.0025, 0.04, 9
    units = ActiveUnits(4)
    for _ in range(3):
        units.add(100.0 + scales * torch.randn(4, 4, 5, 7))
    assert units.count() == 2
    assert units.count() is None
    for value in (math.nan, math.inf):
        units.add(torch.full((4, 4, 5, 7), value))
        assert units.count() is None


def test_active_units_know_the_exact_variance_and_go_on_from_their_state() -> None:
    for variance, active in ((0.0101, 1), (0.0099, 0)):
        values = 50.0 + math.sqrt(variance) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        units = ActiveUnits(1)
        units.add(values[:1].view(1, 1, 1, 1))
        units = ActiveUnits(1, saved=units.state())
        units.add(values[1:].view(1, 1, 1, 1))
        assert units.count() == active


def test_active_units_join_the_ranks_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant on each rank, but not the same constant."""
    other, units = RunningMoments(1), ActiveUnits(1)
    other.update(torch.ones(2, 1, 3, 3), axis=1)
    units.add(torch.zeros(2, 1, 3, 3))
    monkeypatch.setattr(moments, "gather_objects", lambda mine: [mine, other.state_dict()])
    assert units.count() == 1
