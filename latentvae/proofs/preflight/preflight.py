"""Run `latentvae preflight` and the option `--preflight`.

The preflight makes a few updates of the run, checks their effects, and prints a line for each
check.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from latentvae.compute.memory import keep_freed_memory
from latentvae.config.presets import checked
from latentvae.distributed import barrier, from_main, gather_objects, is_main, world_size
from latentvae.engine.processes import end_accelerator, start_accelerator
from latentvae.engine.run_options import check_options
from latentvae.engine.training import build_training
from latentvae.engine.updates import Updates
from latentvae.proofs.checks import Check, check_json_file, conclude, wrapped
from latentvae.proofs.preflight import (
    learning_checks,
    networks,
    ranks,
    resources,
    saving,
    schedule_checks,
    terms,
)
from latentvae.proofs.preflight.rehearsal import UPDATES, Rehearsal, rehearsed
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.discretise import check_discretising
from latentvae.tasks.autoencoder.fine_tuning import with_shape_of
from latentvae.tasks.autoencoder.reach import check_model_learns
from latentvae.tasks.autoencoder.task import AutoencoderTask

GROUPS: tuple[Callable[[Rehearsal], Iterator[Check]], ...] = (
    learning_checks.checks,
    schedule_checks.checks,
    ranks.checks,
    networks.checks,
    terms.checks,
    saving.checks,
    resources.checks,
)


def preflight(config: TrainConfig, *, json: Path | None = None) -> int:
    """Check a run before it starts, and print a line for each check.

    All ranks must call this function. The preflight does not change the run's own folder. In this
    folder, it reads only the sizes of checkpoints.

    Args:
        config: options of the run.
        json: file for the results of the checks. With None, no file is written.

    Returns:
        The exit code: 0 if all checks pass, 1 if a check fails.

    Raises:
        UserError: an option, a path or the image folder is wrong.
    """
    check_json_file(json)
    with contextlib.ExitStack() as stack:
        return _report(_open(config, stack), json=json)


def _report(rehearsal: Rehearsal, *, json: Path | None) -> int:
    """Make the checks and print their results. Return the exit code on all ranks."""
    show, checks = rehearsal.training.accelerator.print, []
    show(wrapped(_heading(rehearsal)), flush=True)
    show(f"  making {UPDATES} updates, then checking their effects", flush=True)
    for check in _checks(rehearsal):
        checks.append(joined(check))
        show(checks[-1], flush=True)
    code = from_main(conclude(checks, json_file=json) if is_main() else 0)
    barrier()  # no rank may end its process group while another rank still waits
    return code


def _open(config: TrainConfig, stack: contextlib.ExitStack) -> Rehearsal:
    """Build the short run that the checks examine. ``stack`` later removes the temporary folder."""
    config = checked(config)
    nowhere = Path(tempfile.gettempdir()) / "latentvae-preflight"  # there is no run at this path
    check_model_learns(config)
    task = AutoencoderTask(rehearsed(config, nowhere))
    task.check()
    check_options(task.config.run)
    task.open()
    check_discretising(config, task.base)
    config = with_shape_of(config, task.base)
    accelerator = start_accelerator(task.config.run, nowhere)
    stack.callback(end_accelerator, accelerator)
    config = config.for_processes(accelerator.num_processes)
    keep_freed_memory(accelerator.device)  # like `train`, so that time and memory are the same
    folder = temporary_folder(stack)
    training = build_training(task, folder=folder, accelerator=accelerator)
    return Rehearsal(asked=config, task=task, training=training, updates=Updates(training))


def temporary_folder(stack: contextlib.ExitStack) -> Path:
    """Return one temporary folder, which the first process makes and all processes use.

    The first process removes the folder when all processes have finished.
    """
    name = None
    if is_main():
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="latentvae-preflight-"))
    return Path(from_main(name))


def _heading(rehearsal: Rehearsal) -> str:
    accelerator = rehearsal.training.accelerator
    return (
        f"preflight of {rehearsal.asked.config}: {type(rehearsal.task.net).__name__}, "
        f"{rehearsal.training.items_per_update} images per update in {world_size()} "
        f"process{'es' if world_size() > 1 else ''} on {accelerator.device}, precision "
        f"{accelerator.mixed_precision}"
    )


def _checks(rehearsal: Rehearsal) -> Iterator[Check]:
    """Make the updates and yield the checks. If an update fails, yield only the check `updates`."""
    try:
        rehearsal.rehearse()
    except torch.cuda.OutOfMemoryError as error:
        if world_size() > 1:  # other ranks wait in the update, so the launcher ends them all
            raise
        yield _out_of_memory(rehearsal, error)
        return
    finite = learning_checks.updates(rehearsal)
    yield finite
    if all(gather_objects(finite.passed)):
        for group in GROUPS:
            yield from group(rehearsal)


def _out_of_memory(rehearsal: Rehearsal, error: Exception) -> Check:
    batch = rehearsal.task.config.run.train_batch_size
    return Check(
        name="updates",
        passed=False,
        value=str(error).partition(". ")[0],
        expected=f"{UPDATES} updates with {batch} images per process",
        advice=f"Give {' or '.join(rehearsal.task.memory_advice()) or 'a smaller resolution'}.",
    )


def joined(check: Check) -> Check:
    """Return the result of the first rank where the check failed, or else the result of rank 0."""
    found: list[Check] = gather_objects(check)
    failed = [(rank, one) for rank, one in enumerate(found) if not one.passed]
    if not failed:
        return found[0]
    rank, one = failed[0]
    return replace(one, value=f"process {rank}: {one.value}") if len(found) > 1 else one
