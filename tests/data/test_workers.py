"""More workers than cores are explained once, in our words."""

import os
import warnings

import pytest
from torch.utils.data import DataLoader

from latentvae.data.dataset import QuietLoader
from latentvae.data.workers import _say_too_many, explained_workers


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_too_many_workers_are_explained_once(caplog):
    _say_too_many.cache_clear()
    cores = len(os.sched_getaffinity(0))
    with pytest.warns(UserWarning, match="This DataLoader will create"):  # torch's own
        DataLoader([1, 2], num_workers=cores + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with explained_workers(cores + 1):
                loader = QuietLoader([1, 2], num_workers=cores + 1)
        assert sorted(int(batch) for batch in loader) == [1, 2]
        with explained_workers(cores):
            pass
    (line,) = caplog.messages
    assert f"{cores + 1} worker processes were asked for" in line and f"at most {cores}." in line
