"""Predict the time, memory and disk space of the complete run from the updates that were made."""

import math
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.rehearsal import DISCRIMINATOR_START, Rehearsal, Seen

FULL = 0.95  # above this share of the memory a larger batch may fail
GIB = 2**30


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    """Yield the checks of time, memory and disk space."""
    yield duration(rehearsal)
    yield memory(rehearsal)
    yield disk(rehearsal)


def duration(rehearsal: Rehearsal) -> Check:
    """Report the predicted time of the complete run. A long time is not a failure."""
    # updates
    asked, total = rehearsal.asked, rehearsal.asked.run.max_train_steps
    alone, both = (
        _seconds(rehearsal.seen[:DISCRIMINATOR_START]),
        _seconds(rehearsal.seen[DISCRIMINATOR_START:]),
    )
    start = (
        min(asked.discriminator_start, total) if rehearsal.task.discriminator is not None else total
    )
    training = start * alone + (total - start) * both

    # validations and saves
    images = min(asked.data.max_validation_images, len(rehearsal.task.validation_images))
    validations = math.ceil(total / asked.run.validation_steps)
    saves = math.ceil(total / asked.run.checkpointing_steps)
    beside = validations * images * rehearsal.validation_seconds + saves * rehearsal.save_seconds
    whole = training + beside
    text = str(timedelta(seconds=round(whole))) if math.isfinite(whole) else "unknown"
    return Check(
        name="time",
        passed=math.isfinite(whole),
        value=f"{text} for {total:,} updates ({alone:.3g} s each, "
        f"{both:.3g} s with the discriminator), "
        f"{validations:,} validations and {saves:,} checkpoints",
        expected="a time for the whole run",
        advice="The updates took no measurable time.",
    )


def _seconds(seen: list[Seen]) -> float:
    """Return the time of the fastest update, because the first update is slower than the others."""
    return min(update.seconds for update in seen)


def memory(rehearsal: Rehearsal) -> Check:
    """Check that the training of a batch fits into memory with a margin.

    Without a margin, the run fails when another process or a batch of larger images needs more
    memory.
    """
    device = rehearsal.training.accelerator.device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = psutil.virtual_memory().total // rehearsal.training.accelerator.num_processes
    return Check(
        name="memory",
        passed=rehearsal.peak_memory <= FULL * total,
        value=f"{rehearsal.peak_memory / GIB:.2f} GiB used of {total / GIB:.2f} GiB on {device}",
        expected=f"at most {FULL:.0%} of the memory of each process",
        advice=f"Give {' or '.join(rehearsal.task.memory_advice()) or 'a smaller resolution'}.",
    )


def disk(rehearsal: Rehearsal) -> Check:
    """Check that checkpoints and export fit on the disk.

    If the disk becomes full, the run ends in the middle of a save.
    """
    limit = rehearsal.asked.run.checkpoints_total_limit
    net = sum(value.numel() * 4 for value in rehearsal.task.net.state_dict().values())
    # Count one checkpoint more than is kept, because an old checkpoint is deleted only after a new
    # one is saved.
    needed = (limit + 1) * rehearsal.checkpoint_bytes + net
    folder = Path(rehearsal.asked.run.output_dir or ".")
    free = shutil.disk_usage(_existing(folder)).free + _kept(folder)
    return Check(
        name="disk",
        passed=needed <= free,
        value=f"{needed / GIB:.2f} GiB needed, {free / GIB:.2f} GiB free",
        expected=f"room for {limit} + 1 checkpoints and the export",
        advice="Free some space, lower checkpoints_total_limit, or give another output_dir.",
    )


def _existing(folder: Path) -> Path:
    """Return the nearest existing parent of a folder, or the folder itself if it exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _kept(folder: Path) -> int:
    """Return the size in bytes of the folder's checkpoints, which new checkpoints will replace."""
    return sum(path.stat().st_size for path in folder.glob("checkpoint-*/*") if path.is_file())
