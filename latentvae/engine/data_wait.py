"""A clock for the time that updates wait for their batches, and advice against it."""

import math
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

TOLD_FROM = 0.2  # share of the time from which a warning is printed


class DataWait(Iterator[Any]):
    """An iterator over batches with a clock that runs while the update waits for one.

    The clock counts host time and syncs no device. The first wait does not count, because workers
    start in it.

    Args:
        loader: gives the batches. It is asked for them when the first one is needed.
        num_workers: processes of this rank that read data.
        num_processes: ranks on this machine, which share its cores.
        unit: name of a batch's items.
        advice: what to try when no core is left for more workers.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        num_workers: int = 0,
        num_processes: int = 1,
        unit: str = "items",
        advice: str = "make the data faster to read",
    ) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._num_workers = num_workers
        self._num_processes = num_processes
        self._unit, self._advice = unit, advice
        self._seconds = 0.0
        self._told = False

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = iter(self._loader)
            return next(self._batches)
        start = time.perf_counter()
        batch = next(self._batches)
        self._seconds += time.perf_counter() - start
        return batch

    def take(self) -> float:
        """Return the seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def advice(self, waited: float, elapsed: float, *, updates: int) -> str | None:
        """Return a warning about a window of the run, once. None when the wait is short.

        Args:
            waited: seconds of `elapsed` in which an update waited.
            elapsed: seconds that the window took.
            updates: number of updates in the window.
        """
        if self._told or waited < TOLD_FROM * elapsed:
            return None
        self._told = True
        return (
            f"the update waits for {self._unit} {waited / elapsed:.0%} of the time ({self._unit} "
            f"{waited / updates:.2g} s, update {(elapsed - waited) / updates:.2g} s): "
            f"{self._remedy(waited, elapsed)}"
        )

    def _remedy(self, waited: float, elapsed: float) -> str:
        """Advise as many workers as the update needs, if there are cores for them."""
        computing = max(elapsed - waited, 1e-9)
        # The work of the workers (or of this process in `waited`) must fit into the computing time.
        needed = math.ceil(self._num_workers * elapsed / computing or waited / computing)
        spare = (os.cpu_count() or 1) // self._num_processes
        if min(needed, spare) > self._num_workers:
            return f"try --dataloader_num_workers {min(needed, spare)}"
        return f"{self._num_workers} workers have no more cores. Better {self._advice}"
