"""Make and check the first updates of a task whose whole loss is one logged value.

    exit_code = run_checks(PriorTask, config, checks, json=None)

This module has the checks that several tasks share. `prior_preflight`, `flow_preflight`,
`likelihood_preflight` and `distill_preflight` add the checks of their own task.
"""

import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from latentvae.compute.memory import keep_freed_memory
from latentvae.config.presets import checked
from latentvae.config.run_config import JobConfig
from latentvae.distributed import (
    all_reduce_mean,
    barrier,
    from_main,
    gather_objects,
    is_main,
    world_size,
)
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
REPEATS = 8  # number of updates on the same data, in which the loss must fall
LOSS_TOLERANCE = 1e-2  # allowed relative difference of a repeated loss on a GPU
DRAWS = 4096  # number of classes or captions drawn to measure the share of dropped ones

T = TypeVar("T", bound=Task)


@dataclass(kw_only=True)
class FirstUpdates:
    """The first updates of a run, with everything that the checks need.

    Attributes:
        task: the task, after its networks were built.
        training: the task's training, after the updates.
        start: metrics of a validation before the first update.
        results: result of each update.
        before, after: hash of each group of tensors that an update changes (such as the weights),
            before and after the updates.
        items: indices of the images, latents or token maps in this rank's first batch. Empty if the
            task does not know the order of its data, as with streamed images.
    """

    task: Any
    training: Training
    start: dict[str, float]
    results: list[UpdateResult]
    before: dict[str, str]
    after: dict[str, str]
    items: list[int]

    def losses(self, name: str) -> list[float]:
        """Return the logged value `name` of the first batch of each update."""
        return [result.values[0][name].item() for result in self.results]


def run_checks(
    task: type[Task],
    config: JobConfig,
    checks: Callable[[FirstUpdates], Iterable[Check]],
    *,
    json: Path | None,
) -> int:
    """Make the first updates of a run, check them, and print a line for each check.

    All ranks must call this function.

    Args:
        task: class of the task.
        config: options of the run.
        checks: function that yields the checks. Every rank runs every check.
        json: file for the results of the checks. With None, no file is written.

    Returns:
        The exit code on all ranks: 0 if all checks pass, 1 if a check fails.

    Raises:
        UserError: an option is wrong, or the data cannot be used.
    """
    check_json_file(json)
    with contextlib.ExitStack() as stack:
        rehearsal = _rehearse(task, config, stack)

        show, found = rehearsal.training.accelerator.print, list[Check]()
        show(wrapped(f"preflight of {config.config}: made {UPDATES} updates"))
        for check in checks(rehearsal):
            found.append(joined(check))
            show(found[-1], flush=True)
        code = from_main(conclude(found, json_file=json) if is_main() else 0)
        barrier()  # no rank may end its process group while another rank still waits
        return code


def _rehearse(kind: type[Task], config: JobConfig, stack: contextlib.ExitStack) -> FirstUpdates:
    # the run, in a temporary folder
    nowhere = Path(tempfile.gettempdir()) / "latentvae-preflight"  # there is no run at this path
    config = settle_precision(checked(config), nowhere)
    check_options(config.run)
    task = kind(
        config.with_changes(
            {
                "run": {"output_dir": str(nowhere), "report_to": "none", "push_to_hub": False},
                "optimizer": {"lr_warmup_steps": 0, "lr_scheduler": "constant"},
            }
        )
    )
    task.check()
    task.open()
    accelerator = start_accelerator(task.config.run, nowhere)
    stack.callback(end_accelerator, accelerator)
    keep_freed_memory(accelerator.device)
    training = build_training(task, folder=temporary_folder(stack), accelerator=accelerator)

    # its first updates
    with training.evaluating():
        start = task.validate(0)
    before, batches = fingerprints(training), iter(task.batches(start_step=0))
    results = [Updates(training).make(batches) for _ in range(UPDATES)]
    steps = task.order(
        rank=accelerator.process_index, processes=accelerator.num_processes, start=0, stop=1
    )
    return FirstUpdates(
        task=task,
        training=training,
        start=start,
        results=results,
        before=before,
        after=fingerprints(training),
        items=[] if steps is None else [item[1] for item in steps[0]],
    )


# checks of any task


def updates_check(rehearsal: FirstUpdates, *, loss: str, words: str) -> Check:
    """Check that the gradients and the losses are finite, and report the losses.

    Args:
        loss: key of the loss in the training log.
        words: name of the loss in the line that is printed.
    """
    losses = rehearsal.losses(loss)
    return Check(
        name="updates",
        passed=all(result.finite for result in rehearsal.results)
        and all(map(math.isfinite, losses)),
        value=", ".join(f"{value:.3f}" for value in losses) + f" {words}",
        expected="finite losses and gradients",
        advice="Give a lower --learning_rate, or --mixed_precision no.",
    )


def weights_check(rehearsal: FirstUpdates) -> Check:
    """Check that updates change the weights, the optimizer's state and the weight average."""
    same = [n for n, value in rehearsal.before.items() if rehearsal.after[n] == value]
    return Check(
        name="weights",
        passed=not same,
        value=f"{', '.join(same)} did not change" if same else "all changed",
        expected="weights, optimizer and average change",
        advice="The optimizer does not train the network. Look at --learning_rate.",
    )


def items_check(rehearsal: FirstUpdates) -> Check:
    """Check that the processes' first batches hold no image (or latent, or token map) twice."""
    parts: list[list[int]] = gather_objects(rehearsal.items)
    shared = sum(map(len, parts)) - len(set().union(*parts))
    return Check(
        name="images",
        passed=shared == 0,
        value=f"{shared} images that two processes read in the same update",
        expected="0",
        advice="Each process must read its own images.",
    )


def equal_ranks_check(rehearsal: FirstUpdates) -> Check:
    """Check that all processes have the same training state after the updates.

    The training state is the weights, the optimizer's state and the weight average.
    """
    parts: list[dict[str, str]] = gather_objects(rehearsal.after)
    differs = [name for name in parts[0] if any(part[name] != parts[0][name] for part in parts)]
    return Check(
        name="ranks",
        passed=not differs,
        value=f"{', '.join(differs)} differ between processes" if differs else "equal",
        expected="all processes have the same weights",
        advice="The gradients are not averaged over the processes.",
    )


def dropped_check(dropped: Tensor, share: float) -> Check:
    """Check that the share of dropped conditions is near the requested share.

    A condition is a class or a caption. The check fails if the measured share differs from the
    requested share by more than four standard deviations of the measured share.

    Args:
        dropped: for each of `DRAWS` images, whether its condition was dropped.
        share: share of dropped conditions that the options request.
    """
    found = dropped.float().mean().item()
    return Check(
        name="condition-dropout",
        passed=abs(found - share) <= 4 * math.sqrt(share * (1 - share) / len(dropped)),
        value=found,
        expected=f"about {share:g} of the conditions are dropped",
        advice="Guidance needs a model that was also trained without class or caption.",
    )


def checkpoint_check(rehearsal: FirstUpdates, *, loss: str) -> Check:
    """Check that the next update has the same result before and after a checkpoint is restored.

    On a CPU with one or two processes, all tensors that an update changes are compared bit by bit.
    Otherwise, only the logged value `loss` is compared, and a relative difference of 1 % is
    allowed.
    """
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

    # restore the checkpoint, and make the same update again
    for learner in task.learners.values():
        learner.optimizer.state.clear()  # as at the start of a resume
    restore(training, load_checkpoint(path))
    second = Updates(training).make(iter(task.batches(start_step=training.progress.micro_step)))
    found = fingerprints(training)

    # Sums on GPUs, and sums over more than two processes, have no fixed order.
    exact = training.accelerator.device.type == "cpu" and world_size() <= 2
    differs = [name for name, value in expected.items() if found[name] != value]
    if not exact:
        losses = [result.values[0][loss].item() for result in (first, second)]
        differs = [] if math.isclose(*losses, rel_tol=LOSS_TOLERANCE) else ["losses"]
    return Check(
        name="checkpoint",
        passed=not differs,
        value=f"{', '.join(differs)} differ" if differs else "next update repeated",
        expected="a restored run repeats the next update" + " to the bit" * exact,
        advice="A resumed run would give other weights than an uninterrupted run. `latentvae "
        "verify-resume` shows more.",
    )


def falls_check(rehearsal: FirstUpdates, *, loss: str, advice: str) -> Check:
    """Check that the loss falls if the network learns from the same data again and again.

    Args:
        rehearsal: the training after its first updates.
        loss: name of the loss in the training log.
        advice: what to do if the loss does not fall.
    """
    task = rehearsal.task
    batch = next(iter(task.batches(start_step=0)))
    updates, same = Updates(rehearsal.training), itertools.repeat(batch)
    losses = [updates.make(same).values[0][loss] for _ in range(REPEATS)]
    first, last = (all_reduce_mean(losses[i]).item() for i in (0, -1))
    return Check(
        name="loss-falls",
        passed=last < first,
        value=f"loss {first:.4f} to {last:.4f} in {REPEATS} updates on the same {task.unit}",
        expected="the loss falls",
        advice=advice,
    )
