"""The checks before a run that every generator has, and the rehearsal that they read.

A rehearsal makes a few updates with the user's data, precision and processes, in a temporary
folder. It neither reads nor writes the run's own folder.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from latentvae.compute.memory import keep_freed_memory
from latentvae.config.presets import checked
from latentvae.distributed import barrier, from_main, gather_objects, is_main
from latentvae.engine.checkpoint_content import restore, take_snapshot
from latentvae.engine.checkpoint_files import PREFIX, load_checkpoint, save_checkpoint
from latentvae.engine.processes import end_accelerator, start_accelerator
from latentvae.engine.resume import settle_precision
from latentvae.engine.run_options import check_options
from latentvae.engine.task import Task
from latentvae.engine.training import Training, build_training
from latentvae.engine.updates import UpdateResult, Updates
from latentvae.proofs.checks import Check, check_json_file, conclude, wrapped
from latentvae.proofs.preflight.preflight import joined, temporary_folder
from latentvae.proofs.preflight.rehearsal import fingerprints

UPDATES = 3
LOSS_TOLERANCE = 1e-2  # relative difference of a repeated loss on a GPU
DRAWS = 4096  # conditions that are drawn to measure how many are dropped


@dataclass(kw_only=True)
class Rehearsal:
    """The first updates of a run, and what was seen of them.

    Attributes:
        start: the first validation metric before the first update.
        loss: log name of the loss.
        unit: unit of the loss, in words.
    """

    task: Any
    training: Training
    start: float
    loss: str
    unit: str
    results: list[UpdateResult]
    before: dict[str, str]
    after: dict[str, str]
    items: list[int]


Checks = Callable[[Rehearsal], Iterable[Check]]


def generator_preflight(
    kind: type[Task],
    config: Any,
    checks: Checks,
    *,
    loss: str,
    unit: str,
    metric: str,
    json: Path | None = None,
) -> int:
    """Check the run of a generator, and print a line for each check. All ranks must call this.

    Args:
        kind: class of the task.
        config: options of the run.
        checks: makes the checks in order. All ranks must take all of them.
        loss: log name of the loss.
        unit: unit of the loss, in words.
        metric: validation metric that is the same quantity as the loss.
        json: file for the results of the checks.

    Returns:
        The exit code: 0 if all checks hold, 1 if one failed.

    Raises:
        UserError: an option is wrong, or the data cannot be used.
    """
    check_json_file(json)

    with contextlib.ExitStack() as stack:
        rehearsal = _rehearse(kind, config, stack, loss=loss, unit=unit, metric=metric)
        return _report(rehearsal, checks, json=json)


def _report(rehearsal: Rehearsal, checks: Checks, *, json: Path | None) -> int:
    """Make the checks and print their results. Return the exit code on all ranks."""
    show, made = rehearsal.training.accelerator.print, []
    show(wrapped(f"preflight of {rehearsal.task.config.config}: made {UPDATES} updates"))
    for check in checks(rehearsal):
        made.append(joined(check))
        show(made[-1], flush=True)
    code = from_main(conclude(made, json_file=json) if is_main() else 0)
    barrier()  # no rank may end its process group while another rank still waits
    return code


def _rehearse(
    kind: type[Task],
    config: Any,
    stack: contextlib.ExitStack,
    *,
    loss: str,
    unit: str,
    metric: str,
) -> Rehearsal:
    # the run, in a temporary folder
    nowhere = Path(tempfile.gettempdir()) / "latentvae-preflight"  # there is no run at this path
    config = settle_precision(checked(config), nowhere)
    check_options(config.run)
    task: Any = kind(
        config.with_changes(
            {
                "run": {"output_dir": str(nowhere), "report_to": "none", "push_to_hub": False},
                "optimizer": {"lr_warmup_steps": 0, "lr_scheduler": "constant"},
            }
        )
    )
    task.open()
    accelerator = start_accelerator(task.config.run, nowhere)
    stack.callback(end_accelerator, accelerator)
    keep_freed_memory(accelerator.device)
    training = build_training(task, folder=temporary_folder(stack), accelerator=accelerator)

    # its first updates
    with training.evaluating():
        start = task.validate(0)[metric]
    before, batches = fingerprints(training), iter(task.batches(start_step=0))
    results = [Updates(training).make(batches) for _ in range(UPDATES)]
    steps = task.order(
        rank=accelerator.process_index, processes=accelerator.num_processes, start=0, stop=1
    )
    return Rehearsal(
        task=task,
        training=training,
        start=start,
        loss=loss,
        unit=unit,
        results=results,
        before=before,
        after=fingerprints(training),
        items=[index for _, index in steps[0]],
    )


def check_updates(rehearsal: Rehearsal) -> Check:
    """Check that losses and gradients are finite."""
    losses = [result.values[0][rehearsal.loss].item() for result in rehearsal.results]
    return Check(
        name="updates",
        passed=all(result.finite for result in rehearsal.results),
        value=", ".join(f"{loss:.3f}" for loss in losses) + f" {rehearsal.unit}",
        expected="finite losses and gradients",
        advice="Give a lower --learning_rate, or --mixed_precision no.",
    )


def check_weights(rehearsal: Rehearsal) -> Check:
    """Check that weights, optimizer and average change."""
    same = [n for n, value in rehearsal.before.items() if rehearsal.after[n] == value]
    return Check(
        name="weights",
        passed=not same,
        value=f"{', '.join(same)} did not change" if same else "all changed",
        expected="weights, optimizer and average change",
        advice="The optimizer does not train the network. Look at --learning_rate.",
    )


def check_images(rehearsal: Rehearsal) -> Check:
    """Check that processes read different images."""
    parts: list[list[int]] = gather_objects(rehearsal.items)
    shared = sum(map(len, parts)) - len(set().union(*parts))
    return Check(
        name="images",
        passed=shared == 0,
        value=f"{shared} images that two processes read in the same update",
        expected="0",
        advice="Each process must read its own images.",
    )


def check_ranks(rehearsal: Rehearsal) -> Check:
    """Check that all processes have the same weights after the updates."""
    parts: list[dict[str, str]] = gather_objects(rehearsal.after)
    differs = [name for name in parts[0] if any(part[name] != parts[0][name] for part in parts)]
    return Check(
        name="ranks",
        passed=not differs,
        value=f"{', '.join(differs)} differ between processes" if differs else "equal",
        expected="all processes have the same weights",
        advice="The gradients are not averaged over the processes.",
    )


def check_dropped(dropped: Tensor, share: float) -> Check:
    """Check the share of dropped conditions, within four standard deviations.

    Args:
        dropped: for each of `DRAWS` images, whether its condition was dropped.
        share: the share that the options ask for.
    """
    found = dropped.float().mean().item()
    return Check(
        name="condition-dropout",
        passed=abs(found - share) <= 4 * math.sqrt(share * (1 - share) / len(dropped)),
        value=found,
        expected=f"about {share:g} of the conditions are dropped",
        advice="Guidance needs a model that has learned without condition.",
    )


def check_checkpoint(rehearsal: Rehearsal) -> Check:
    """Check that the training repeats its next update after a checkpoint is restored."""
    # save, then the next update
    task, training = rehearsal.task, rehearsal.training
    update = training.progress.update
    path, snapshot = training.folder / f"{PREFIX}{update}", take_snapshot(training)
    if is_main():
        save_checkpoint(training.folder, snapshot, update=update, keep=1)
    barrier()
    micro_step = training.progress.micro_step
    first = Updates(training).make(iter(task.batches(start_step=micro_step)))
    expected = fingerprints(training)

    # restore, and the same update again
    for learner in task.learners.values():
        learner.optimizer.state.clear()  # as at the start of a resume
    restore(training, load_checkpoint(path))
    second = Updates(training).make(iter(task.batches(start_step=training.progress.micro_step)))
    found = fingerprints(training)

    # to the bit on CPUs. Sums on GPUs have no fixed order, so only the loss is compared there.
    exact = training.accelerator.device.type == "cpu"
    differs = [name for name, value in expected.items() if found[name] != value]
    if not exact:
        losses = [result.values[0][rehearsal.loss].item() for result in (first, second)]
        differs = [] if math.isclose(*losses, rel_tol=LOSS_TOLERANCE) else ["losses"]
    return Check(
        name="checkpoint",
        passed=not differs,
        value=f"{', '.join(differs)} differ" if differs else "next update repeated",
        expected="a restored run repeats the next update" + " to the bit" * exact,
        advice="A resumed run would give other weights. `latentvae verify-resume` shows more.",
    )
