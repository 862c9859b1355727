"""More workers than processors are explained once, in our words."""

import logging
import warnings

import pytest
from torch.utils.data import DataLoader

from latentvae.data.workers import explain_num_workers


def test_too_many_workers_are_explained_once(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        for count in (100_001, 100_001, 0):
            explain_num_workers(count)
            DataLoader([1, 2, 3], num_workers=count)  # pyright: ignore[reportArgumentType]
    assert not warned
    (record,) = caplog.records
    assert record.getMessage().startswith("100001 processes read images, but this process may use")
