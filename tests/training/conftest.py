"""Runs of several precisions in one process: Accelerate keeps the first one's for good."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(scope="module")
def own_accelerate() -> Iterator[None]:
    """Accelerate as in a new process, for a module of tests and after it."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
