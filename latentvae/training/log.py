"""What a run tells: a progress bar, rows in log.jsonl, and a tracker when asked."""

import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from latentvae.distributed import all_reduce_mean
from latentvae.errors import UserError

_TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_tracker(name: str) -> None:
    """Refuse a tracker that is asked for and not installed; Accelerate would go on without it."""
    packages = _TRACKER_PACKAGES.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise UserError(
            f"report_to is '{name}', but it is not installed; run `pip install "
            f"{packages[0]}` or use --report_to none"
        )


class MeanWindow:
    """Running means of device scalars between two rows of the log; no host sync until `means`."""

    def __init__(self, saved: Mapping[str, list[float]] | None = None) -> None:
        self.sums: dict[str, Any] = {name: total for name, (total, _) in (saved or {}).items()}
        self.counts = {name: int(count) for name, (_, count) in (saved or {}).items()}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means over updates and ranks; empties the window."""
        if not self.sums:
            return {}
        import torch

        names = sorted(self.sums)
        local = torch.stack(
            [torch.as_tensor(self.sums[n] / self.counts[n]).double() for n in names]
        )
        self.sums, self.counts = {}, {}
        return dict(zip(names, all_reduce_mean(local).tolist(), strict=True))

    def state(self) -> dict[str, list[float]]:
        return {name: [float(total), self.counts[name]] for name, total in self.sums.items()}


class RunLog:
    """log.jsonl, the progress bar and the tracker; silent on all ranks but the first.

    Args:
        folder: the run's folder.
        accelerator: knows the ranks and the tracker.
        start: updates done already; rows of later updates, left by a killed run, are dropped.
        total: updates of the whole run.
        images_per_update: effective batch.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        *,
        start: int,
        total: int,
        images_per_update: int,
    ) -> None:
        self.accelerator = accelerator
        self.active = accelerator.is_main_process
        self.path = folder / "log.jsonl"
        self.images_per_update = images_per_update
        self.bar = tqdm(
            total=total, initial=start, unit="update", desc="training", disable=not self.active
        )
        self._mark = (time.perf_counter(), start)
        if self.active:
            _drop_rows_after(self.path, start)

    def step(self) -> None:
        self.bar.update(1)

    def row(self, update: int, values: Mapping[str, float]) -> None:
        """Append a row of training values, with the speed since the last one."""
        now, (then, done) = time.perf_counter(), self._mark
        speed = (update - done) * self.images_per_update / max(now - then, 1e-9)
        self._mark = (now, update)
        images = update * self.images_per_update
        self.write(update, {"images": images, **values, "time/images_per_second": speed})
        shown = {
            name.split("/")[1]: f"{values[name]:.3g}"
            for name in ("loss/rec", "loss/lpips")
            if name in values
        }
        self.bar.set_postfix({**shown, "images/s": f"{speed:.1f}"})

    def write(self, update: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"update": update, **values}) + "\n")
        self.accelerator.log(dict(values), step=update)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self.bar.write(text)

    def pause(self) -> None:
        """Leave out of the speed what was not training since the last row."""
        self._mark = (time.perf_counter(), self.bar.n)

    def close(self) -> None:
        self.bar.close()


def _drop_rows_after(path: Path, update: int) -> None:
    """Keep the rows up to ``update``; a last line cut short by a kill is dropped as well."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text().splitlines() if _update_of(line) <= update]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)


def _update_of(line: str) -> float:
    try:
        return float(json.loads(line)["update"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
