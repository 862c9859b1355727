"""Measure the time that updates wait for their batches, and advise how to shorten it."""

import math
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

TOLD_FROM = 0.2  # a warning is printed if updates wait for at least this share of the time


class DataWait(Iterator[Any]):
    """An iterator over batches that measures how long updates wait for their batches.

    The iterator measures time on the host and does not synchronise with the device. The first wait
    does not count, because the workers start during it.

    Args:
        loader: yields the batches. The loader's iterator is created when the first batch is needed.
        num_workers: number of this rank's processes that read data.
        num_processes: number of ranks on this machine, which share the cores.
        unit: name of a batch's items, such as images.
        advice: text that says what to try when no core is left for more workers.
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
        """Return the number of seconds that updates have waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def advice(self, waited: float, elapsed: float, *, updates: int) -> str | None:
        """Return a warning if updates wait long for data, but only once per run. Otherwise None.

        Long means at least the fraction `TOLD_FROM` of `elapsed`.

        Args:
            waited: seconds of `elapsed` in which updates waited for batches.
            elapsed: seconds since the last row of the log.
            updates: number of updates in `elapsed`.
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
        """Return text that advises more workers.

        If no core is left for them, the text gives the argument `advice` of the class instead.
        """
        computing = max(elapsed - waited, 1e-9)
        # While an update computes, the workers must read the next batch. Without workers, `waited`
        # is the time in which this process reads the batches.
        needed = math.ceil(self._num_workers * elapsed / computing or waited / computing)
        spare = (os.cpu_count() or 1) // self._num_processes
        if min(needed, spare) > self._num_workers:
            return f"try --dataloader_num_workers {min(needed, spare)}"
        number = self._num_workers
        return f"there are no cores for more than {number} workers. Better {self._advice}"
