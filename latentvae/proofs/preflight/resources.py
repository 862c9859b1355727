"""Checks of what the whole run will cost, foretold from the updates that were made."""

import math
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.rehearsal import DISCRIMINATOR_START, Rehearsal, Seen

FULL = 0.95  # share of the memory from which the next longer batch may fail
GIB = 2**30


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    yield duration(rehearsal)
    yield memory(rehearsal)
    yield disk(rehearsal)


def duration(rehearsal: Rehearsal) -> Check:
    """Not a fault, but who knows it beforehand?"""
    asked, total = rehearsal.asked, rehearsal.asked.run.max_train_steps
    alone, both = (
        _seconds(rehearsal.seen[:DISCRIMINATOR_START]),
        _seconds(rehearsal.seen[DISCRIMINATOR_START:]),
    )
    start = (
        min(asked.discriminator_start, total) if rehearsal.task.discriminator is not None else total
    )
    training = start * alone + (total - start) * both
    images = min(asked.data.max_validation_images, len(rehearsal.task.validation_images))
    validations = math.ceil(total / asked.run.validation_steps)
    saves = math.ceil(total / asked.run.checkpointing_steps)
    beside = validations * images * rehearsal.validation_seconds + saves * rehearsal.save_seconds
    whole = training + beside
    told = str(timedelta(seconds=round(whole))) if math.isfinite(whole) else "unknown"
    return Check(
        name="time",
        passed=math.isfinite(whole),
        value=f"{told} for {total:,} updates ({alone:.3g} s each, "
        f"{both:.3g} s with the discriminator), "
        f"{validations:,} validations and {saves:,} checkpoints",
        expected="told for the whole run",
        advice="the updates took no measurable time",
    )


def _seconds(seen: list[Seen]) -> float:
    """Of an update; the first of a kind warms up."""
    return min(update.seconds for update in seen)


def memory(rehearsal: Rehearsal) -> Check:
    """A batch that only just fits fails where another process or a larger bucket needs a little
    more."""
    device = rehearsal.training.accelerator.device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = psutil.virtual_memory().total // rehearsal.training.accelerator.num_processes
    return Check(
        name="memory",
        passed=rehearsal.peak_memory <= FULL * total,
        value=f"{rehearsal.peak_memory / GIB:.2f} GiB of {total / GIB:.2f} GiB on {device}",
        expected=f"at most {FULL:.0%} of what each process has",
        advice="halve train_batch_size and double gradient_accumulation_steps, or give "
        "--gradient_checkpointing or --mixed_precision bf16",
    )


def disk(rehearsal: Rehearsal) -> Check:
    """A disk that fills up ends a run in the middle of a save."""
    limit = rehearsal.asked.run.checkpoints_total_limit
    net = sum(value.numel() * 4 for value in rehearsal.task.net.state_dict().values())
    # One more than is kept: an old checkpoint goes only after a new one is there.
    needed = (limit + 1) * rehearsal.checkpoint_bytes + net
    folder = Path(rehearsal.asked.run.output_dir or ".")
    free = shutil.disk_usage(_existing(folder)).free + _kept(folder)
    return Check(
        name="disk",
        passed=needed <= free,
        value=f"{needed / GIB:.2f} GiB of {free / GIB:.2f} GiB free",
        expected=f"room for {limit} + 1 checkpoints and the export",
        advice="free some space, lower checkpoints_total_limit, or give another output_dir",
    )


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there: the run's own may not be yet."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _kept(folder: Path) -> int:
    """Bytes of checkpoints that this run left earlier, which go as new ones come."""
    return sum(path.stat().st_size for path in folder.glob("checkpoint-*/*") if path.is_file())
