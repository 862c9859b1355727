"""Log a run in log.jsonl, on a progress bar, and in an experiment tracker if the user wants one."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from latentvae.distributed import all_reduce_mean
from latentvae.engine.data_wait import DataWait
from latentvae.engine.tracker import Tracker

BAR_WIDTH = 80  # Largest width of the progress bar in columns.
Window = dict[str, list[float]]  # Sum and count of each logged value since the last row, by name.


class MeanWindow:
    """Running means of logged scalars between two log rows.

    The sums stay on the device. Only `means` and `state` wait for the device.
    """

    def __init__(self, device: torch.device, *, saved: Window | None = None) -> None:
        saved = saved or {}
        self.sums = {name: torch.tensor(total, device=device) for name, (total, _) in saved.items()}
        self.counts = {name: int(count) for name, (_, count) in saved.items()}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each value since the last call, over all ranks, and reset the sums."""
        names = sorted(self.sums)
        if not names:
            return {}
        local = torch.stack([self.sums[name] / self.counts[name] for name in names])
        self.sums, self.counts = {}, {}
        return dict(zip(names, all_reduce_mean(local).tolist(), strict=True))

    def state(self) -> Window:
        return {name: [float(total), self.counts[name]] for name, total in self.sums.items()}


class RunLog:
    """A log that writes to log.jsonl, the progress bar and the tracker, on the first rank only.

    Args:
        folder: the run's folder.
        accelerator: the `Accelerator`, which knows the ranks and the tracker.
        start: number of updates already done. Rows of later updates in log.jsonl are deleted,
            because the run repeats these updates.
        total: number of updates of the complete run.
        items_per_update: effective batch size.
        unit: name of the items in a batch, such as images.
        shown: names of the logged values that are also printed with each row.
        waiting: measures how long updates wait for batches, for the logged value
            `time/data_wait_share` and for a warning.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        *,
        start: int,
        total: int,
        items_per_update: int,
        unit: str = "items",
        shown: Sequence[str] = (),
        waiting: DataWait | None = None,
    ) -> None:
        self.tracker = Tracker(accelerator, say=self.say)
        self.active = accelerator.is_main_process
        self.path, self.total = folder / "log.jsonl", total
        self.items_per_update, self.unit, self.shown = items_per_update, unit, shown
        self.waiting = waiting

        # With None, tqdm shows no bar if there is no terminal.
        self.bar = tqdm(
            total=total,
            initial=start,
            unit="update",
            desc="training",
            disable=None if self.active else True,
            ncols=min(shutil.get_terminal_size().columns, BAR_WIDTH),
        )
        self._mark = (time.perf_counter(), start)

        # the validation after `start` updates, if a killed run has logged it
        self.validation: dict[str, Any] | None = None
        if self.active:
            for row in _keep_rows_up_to(self.path, start):
                if row["update"] == start and any(name.startswith("validation/") for name in row):
                    self.validation = {n: v for n, v in row.items() if n != "update"}

    def step(self) -> None:
        self.bar.update(1)

    def row(self, update: int, values: Mapping[str, float]) -> None:
        """Append a row of training values to the log, with the speed since the last row."""
        # speed
        now, (then, done) = time.perf_counter(), self._mark
        elapsed = max(now - then, 1e-9)
        speed = (update - done) * self.items_per_update / elapsed
        self._mark = (now, update)

        # log.jsonl
        items = {self.unit: update * self.items_per_update}
        times = {f"time/{self.unit}_per_second": speed}
        if self.waiting is not None:
            waited = self.waiting.take()
            times["time/data_wait_share"] = waited / elapsed
            if advice := self.waiting.advice(waited, elapsed, updates=update - done):
                self.say(advice)
        self.write(update, {**items, **values, **times})

        # print a line above the progress bar, so that a terminal shows the same rows as a
        # redirected output
        shown = {
            name.rpartition("/")[2]: f"{values[name]:.3g}" for name in self.shown if name in values
        } | {f"{self.unit}/s": f"{speed:.1f}"}
        left = timedelta(seconds=round((self.total - update) * self.items_per_update / speed))
        listed = ", ".join(f"{name} {value}" for name, value in shown.items())
        self.say(f"update {update:,} of {self.total:,}: {listed}, {left} left")

    def write(self, update: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        append_row(self.path, {"update": update, **values})
        self.tracker.log(values, update=update)

    def picture(self, update: int, path: Path) -> None:
        """Send a picture file to the tracker."""
        if self.active:
            self.tracker.picture(path, update=update)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            # A closed terminal may have ended the process that reads our output through a pipe. The
            # run continues to its next checkpoint.
            with contextlib.suppress(BrokenPipeError):
                self.bar.write(text)
                sys.stdout.flush()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside this context when the speed of the training is computed."""
        start = time.perf_counter()
        yield
        then, done = self._mark
        self._mark = (then + time.perf_counter() - start, done)

    def close(self) -> None:
        self.bar.close()


def sample_path(folder: Path, update: int) -> Path:
    """Return the path of the picture of samples after an update."""
    return folder / "samples" / f"update-{update:06d}.png"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log. Damaged rows, such as a last row cut off by a kill, are skipped."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("update"), int):
                rows.append(row)
    return rows


def append_row(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def _keep_rows_up_to(path: Path, update: int) -> list[dict[str, Any]]:
    """Delete the log rows after `update`, because the run repeats the updates of these rows.

    Return the rows that stay.
    """
    kept = [row for row in read_rows(path) if row["update"] <= update]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(path)
    return kept
