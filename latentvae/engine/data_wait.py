"""How long the update waits for its batches, and what helps."""

import math
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

TOLD_FROM = 0.2  # share of the time that is worth a word


class DataWait(Iterator[Any]):
    """Batches, with a clock that runs while the next one is waited for.

    It counts host time and syncs no device. The first wait is not counted: workers start in it.

    Args:
        loader: gives the batches; asked for the first of them when that is wanted.
        num_workers: processes of this rank that read images.
        num_processes: ranks on this machine, among which its cores are shared.
        unit: what the batches are made of.
        advice: what helps where no core is left for more workers.
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
        """Seconds waited since this was last called."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def advice(self, waited: float, elapsed: float, *, updates: int) -> str | None:
        """What to say, once, of a window of the run; None where there is nothing to say.

        Args:
            waited: seconds of `elapsed` in which the update had no images.
            elapsed: seconds that the window took, all told.
            updates: made in it.
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
        """Workers until they keep up with the update, if there are cores for them."""
        computing = max(elapsed - waited, 1e-9)
        # What the workers, or this process in `waited`, did in the window must fit into its update.
        needed = math.ceil(self._num_workers * elapsed / computing or waited / computing)
        spare = (os.cpu_count() or 1) // self._num_processes
        if min(needed, spare) > self._num_workers:
            return f"try --dataloader_num_workers {min(needed, spare)}"
        return f"{self._num_workers} workers have no more cores; {self._advice}"
