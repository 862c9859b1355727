"""Trainings in forks of this process that are killed, by the hundred in minutes."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentvae.engine import checkpoint_files as checkpoint
from latentvae.engine.checkpoint_files import (
    checkpoints,
    half_written,
    load_checkpoint,
    newest_usable,
    update_of,
)
from latentvae.proofs.verify_resume.compare import compare, read_results
from latentvae.tasks.autoencoder import train
from tests.forks import forked
from tests.tasks.autoencoder.small import small_config

OPTIONS: dict[str, Any] = {
    "perceptual_scale": 0.0,
    "train_batch_size": 2,
    "max_train_steps": 8,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 1,
    "validation_steps": 8,
    "max_validation_images": 1,
    "num_sample_images": 1,
    "log_steps": 1,
}


def straight_run(folder: Path, **changes: Any) -> float:
    """A run that is not killed; returns its seconds. One in this process goes before it, so that
    what a run imports late is imported once, and not in each fork."""
    first = folder.with_name(f"{folder.name}-first")
    train(small_config(first, **OPTIONS | {"max_train_steps": 1, "checkpointing_steps": 1}))
    start = time.monotonic()
    code = forked(
        lambda: train(small_config(folder, **OPTIONS | changes)),
        output=folder.with_suffix(".txt"),
    )
    assert code == 0, folder.with_suffix(".txt").read_text()
    return time.monotonic() - start


def assert_same(straight: Path, resumed: Path, *, update: int) -> None:
    left, right = (read_results(folder, update=update, parts={}) for folder in (straight, resumed))
    wrong = [check for check in compare(left, right) if not check.passed]
    assert not wrong, "\n".join(map(str, wrong))
    assert not half_written(resumed)
    # A kill between the last save and the deletion of the checkpoint before leaves that one, whole.
    kept = checkpoints(resumed)
    assert len(kept) <= len(checkpoints(straight)) + 1
    assert newest_usable(resumed) == (kept[-1], []) and all(map(load_checkpoint, kept))
    left, right = (
        {path.name for path in run.iterdir()} - {path.name for path in kept}
        for run in (straight, resumed)
    )
    assert left == right


@dataclass
class Killed:
    """What random kills hit, and how many runs they were spread over."""

    hits: Counter[str] = field(default_factory=Counter)
    runs: int = 0


def kill_at_random(
    straight: Path, *, folder: Path, kills: int, seconds: float, seed: int
) -> Killed:
    """Kill trainings at moments drawn over the length of a whole run, until there were so many
    kills; each run is started again until it is done, and equals `straight` then.

    Args:
        straight: a run that was never killed.
        folder: for the others, one after another.
        seconds: of the whole run.
    """
    killed, draw = Killed(), random.Random(seed)
    update, output = OPTIONS["max_train_steps"], folder.with_suffix(".txt")

    # train until there are enough kills
    while killed.hits.total() < kills:
        shutil.rmtree(folder, ignore_errors=True)
        killed.runs += 1
        kept, code = 0, -signal.SIGKILL

        # start this run again until it ends
        while code:
            last = killed.hits.total() >= kills
            code = forked(
                lambda: train(small_config(folder, **OPTIONS)),
                output=output,
                kill_after=None if last else draw.uniform(0.0, seconds),
            )
            assert code in (0, -signal.SIGKILL), output.read_text()
            found, _ = newest_usable(folder)
            now = update_of(found) if found else 0
            assert now >= kept, f"checkpoint {kept} is lost"
            kept = now
            killed.hits.update([_hit(folder)] if code else [])

        # compare the finished run
        assert_same(straight, folder, update=update)
    return killed


def _hit(folder: Path) -> str:
    """What was under way in a folder whose run was killed."""
    kinds = {path.name.split("-")[0] for path in half_written(folder)}
    if "checkpoint" in kinds:
        return "in a save"
    if kinds:
        return "in the export"
    return "elsewhere"


class KillAt:
    """Ends this process by SIGKILL at the n-th point of its saves: before a call that changes the
    disk, or when a write or a deletion is half done.

    Args:
        point: from 1; 0 only counts.
    """

    def __init__(self, point: int) -> None:
        self.point = point
        self.passed = 0
        self._patched: list[tuple[Any, str, Any]] = []

    def arm(self) -> None:
        """For good: the process is a fork."""
        self._patch(checkpoint, "save_file", self._half_saved)
        self._patch(checkpoint.shutil, "rmtree", self._half_deleted)
        self._patch(checkpoint.os, "fsync", None)
        for name in ("mkdir", "rename", "chmod"):
            self._patch(checkpoint.Path, name, None)
        self._patch(checkpoint.Path, "write_text", self._half_written)

    def disarm(self) -> None:
        for owner, name, original in self._patched:
            setattr(owner, name, original)

    def _patch(self, owner: Any, name: str, half: Callable[..., None] | None) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._die_at_the_point()
            if half is not None:
                self._die_at_the_point(lambda: half(original, *args, **kwargs))
            return original(*args, **kwargs)

        self._patched.append((owner, name, original))
        setattr(owner, name, counted)

    def _die_at_the_point(self, first: Callable[[], None] = lambda: None) -> None:
        self.passed += 1
        if self.passed == self.point:
            self.disarm()
            first()
            os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _half_saved(original: Any, tensors: Any, path: Path) -> None:
        original(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    @staticmethod
    def _half_written(original: Any, path: Path, text: str) -> None:
        original(path, text[: len(text) // 2])

    @staticmethod
    def _half_deleted(_: Any, path: Path) -> None:
        files = sorted(path.iterdir())
        for file in files[: len(files) // 2]:
            file.unlink()
