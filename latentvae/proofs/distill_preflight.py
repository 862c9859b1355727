"""Check a distillation before it starts (`train_tiny.py --preflight`).

The preflight makes a few updates with the user's teacher, images, precision and number of
processes. It prints a line for each check. It does not read or change the run's own folder.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from latentvae.distributed import all_reduce_mean
from latentvae.models import calls
from latentvae.models.students import to_student, to_teacher
from latentvae.proofs.checks import Check
from latentvae.proofs.first_updates import (
    FirstUpdates,
    checkpoint_check,
    equal_ranks_check,
    falls_check,
    items_check,
    run_checks,
    updates_check,
    weights_check,
)
from latentvae.tasks.distill.config import DistillConfig
from latentvae.tasks.distill.task import DistillTask

LOSS = "loss/total"
LATENT_STD = 0.4, 2.5  # allowed range of the standard deviation of scaled latents
SCALE_TOLERANCE = 1e-4  # allowed relative error of latents that were scaled and scaled back


def distill_preflight(config: DistillConfig, *, json: Path | None = None) -> int:
    """Check the first updates of a run, and print a line for each check.

    All ranks must call this function.

    Args:
        config: options of the run.
        json: file for the results of the checks. With None, no file is written.

    Returns:
        The exit code: 0 if all checks pass, 1 if a check fails.

    Raises:
        UserError: an option is wrong, or the teacher or the images cannot be used.
    """
    return run_checks(DistillTask, config, _checks, json=json)


def _checks(rehearsal: FirstUpdates) -> Iterator[Check]:
    """Yield the checks in the order of the printed lines. Every rank must run every check."""
    yield updates_check(rehearsal, loss=LOSS, words="total loss")
    yield weights_check(rehearsal)
    yield items_check(rehearsal)
    yield equal_ranks_check(rehearsal)
    yield _teacher(rehearsal)
    yield _parts(rehearsal)
    yield _latents(rehearsal)
    yield _scale(rehearsal)
    yield checkpoint_check(rehearsal, loss=LOSS)
    yield falls_check(
        rehearsal,
        loss=LOSS,
        advice="Give a lower --learning_rate (with --optimizer muon also --muon_learning_rate).",
    )


def _images(rehearsal: FirstUpdates) -> Tensor:
    task: DistillTask = rehearsal.task
    return next(iter(task.batches(start_step=0))).on(task.device)


def _teacher(rehearsal: FirstUpdates) -> Check:
    """Check that the teacher is unchanged after the updates, frozen, and in eval mode."""
    task: DistillTask = rehearsal.task
    same = task.teacher.info()["weights_sha256"] == task.teacher_sha256
    learns = [p for p in task.teacher.net.parameters() if p.requires_grad or p.grad is not None]
    mode = "train" if task.teacher.net.training else "eval"
    changed = "unchanged" if same else "changed"
    return Check(
        name="teacher",
        passed=same and not learns and mode == "eval",
        value=f"{changed}, {len(learns)} weights with a gradient, {mode}",
        expected="unchanged, 0 weights with a gradient, eval",
        advice="The student would learn from a teacher that changes.",
    )


def _parts(rehearsal: FirstUpdates) -> Check:
    """Check that the gradient of one batch reaches all weights that learn, and no other weights."""
    task: DistillTask = rehearsal.task
    batch = next(iter(task.batches(start_step=0)))
    task.micro_step(batch, 0)
    missing, wrong = 0, 0
    for parameter in task.net.parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        missing += parameter.requires_grad and not reached
        wrong += reached and not parameter.requires_grad
    task.learners["model"].optimizer.zero_grad()
    return Check(
        name="parts",
        passed=missing == 0 and wrong == 0,
        value=f"{missing} weights of the {task.pair.part} without a gradient, "
        f"{wrong} frozen weights with a gradient",
        expected="0 and 0",
        advice="Some of the student's weights do not learn, or frozen weights get a gradient.",
    )


@torch.no_grad()
def _latents(rehearsal: FirstUpdates) -> Check:
    """Check that the standard deviation of the teacher's scaled latents is about 1 (0.4 to 2.5).

    The scale is that of the teacher's config, as in diffusion pipelines, even if the student uses
    another scale.
    """
    task: DistillTask = rehearsal.task
    z = task.teacher.normalization.apply(calls.encode(task.teacher.net, _images(rehearsal)))
    std = all_reduce_mean(z.std()).item()
    low, high = LATENT_STD
    return Check(
        name="latents",
        passed=low <= std <= high,
        value=std,
        expected=f"scaled latents with a standard deviation of {low:g} to {high:g}",
        advice=(
            "The scaling_factor in the teacher's config is missing or wrong, and an "
            "AutoencoderTiny limits latents to [-3, 3]. Export the teacher with latentvae, or "
            "correct its config.json."
        ),
    )


@torch.no_grad()
def _scale(rehearsal: FirstUpdates) -> Check:
    """Check that teacher latents stay the same when scaled to the student's scale and back."""
    task: DistillTask = rehearsal.task
    teacher, student = task.teacher.net, task.net
    z = calls.encode(teacher, _images(rehearsal))
    again = to_teacher(student, teacher, to_student(student, teacher, z))
    error = ((again - z).abs().max() / z.abs().max()).item()
    return Check(
        name="scale",
        passed=error < SCALE_TOLERANCE,
        value=error,
        expected=f"a relative error below {SCALE_TOLERANCE:g} after scaling to student and back",
        advice="Student and teacher could not replace each other in a pipeline.",
    )
