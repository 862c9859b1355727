"""`own_process` of the benchmarks without a process, which takes long to start."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def this_process(build: Callable[..., Callable[..., object]], *args: Any) -> Iterator[Any]:
    """What `build(*args)` returns, as a call that returns its seconds."""
    call = build(*args)

    def seconds(*given: Any) -> float:
        start = time.perf_counter()
        call(*given)
        return time.perf_counter() - start

    yield seconds
