"""Check that all scheduled changes, such as the end of a warm-up, happen before the run ends.

The rehearsal (the few updates of the preflight) does not reach the late updates of the run. So
these checks compute the schedule of the complete run with the trainer's own code.
"""

import contextlib
from collections.abc import Iterator

from latentvae.losses.objective.adversarial_weight import adversarial_weight
from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.rehearsal import Rehearsal
from latentvae.tasks.autoencoder.update_step import MODEL


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    with as_asked(rehearsal):
        found = [model_learns(rehearsal), rate_in_run(rehearsal)]
        if rehearsal.task.discriminator is not None:
            found.append(discriminator_in_run(rehearsal))
        if rehearsal.task.config.model.has_kl:
            found.append(kl_in_run(rehearsal))
    yield from found


@contextlib.contextmanager
def as_asked(rehearsal: Rehearsal) -> Iterator[None]:
    """Give the short trial run the schedule of the complete run, inside a `with` block."""
    task, asked, objective = rehearsal.task, rehearsal.asked, rehearsal.task.objective
    kept = task.config, objective.adversarial, task.progress.discriminator_start
    update = rehearsal.training.progress.update
    task.config, objective.adversarial = asked, adversarial_weight(asked.discriminator)
    task.progress.discriminator_start = asked.discriminator_start
    try:
        yield
    finally:
        task.config, objective.adversarial, task.progress.discriminator_start = kept
        rehearsal.training.progress.update = update


def model_learns(rehearsal: Rehearsal) -> Check:
    """Check that the model learns in at least one update.

    With `disc_warmup_steps`, only the discriminator learns for some updates.
    """
    task, total = rehearsal.task, rehearsal.asked.run.max_train_steps
    pause = task.pause(MODEL)
    points = sorted({0, pause.start, pause.stop, total - 1})
    first = next((u for u in points if u < total and MODEL in task.learning(u)), None)
    return Check(
        name="model-learns",
        passed=first is not None,
        value="in no update" if first is None else f"from update {first + 1:,} on",
        expected=f"the model learns within the {total:,} updates of the run",
        advice="lower disc_warmup_steps, in which only the discriminator learns, or raise "
        "max_train_steps",
    )


def rate_in_run(rehearsal: Rehearsal) -> Check:
    """Check that the learning rate's warm-up ends within the run."""
    task, asked, progress = rehearsal.task, rehearsal.asked, rehearsal.training.progress
    total, pause = asked.run.max_train_steps, task.pause(MODEL)
    warmup, highest = asked.optimizer.lr_warmup_steps, 0.0
    for update in {max(warmup - 1, 0), max(warmup - 1, 0) + len(pause), total - 1}:
        if update < total:
            progress.update = update
            rehearsal.updates.set_learning_rates()
            groups = task.learners[MODEL].optimizer.param_groups
            highest = max(highest, *(group["lr"] for group in groups))
    share = highest / asked.optimizer.learning_rate
    return Check(
        name="rate-in-run",
        passed=share > 1 - 1e-6,
        value=f"{share:.0%} of learning_rate",
        expected=f"the full learning_rate within the {total:,} updates of the run",
        advice="give lr_warmup_steps as a share of the run, such as 0.1",
    )


def discriminator_in_run(rehearsal: Rehearsal) -> Check:
    """Check that the adversarial weight reaches its full value before the run ends."""
    task, asked = rehearsal.task, rehearsal.asked
    total, scale = asked.run.max_train_steps, asked.discriminator.disc_scale
    adversary = task.adversary(total - 1)
    factor = 0.0 if adversary is None else adversary.factor
    return Check(
        name="discriminator-in-run",
        passed=factor >= scale * (1 - 1e-6),
        value=f"{factor / scale:.0%} of disc_scale",
        expected=f"the full disc_scale within the {total:,} updates of the run",
        advice="lower disc_start, disc_warmup_steps or disc_ramp_steps (shares of the run such "
        "as 0.1 work too), raise max_train_steps, or leave the discriminator out: disc_scale 0",
    )


def kl_in_run(rehearsal: Rehearsal) -> Check:
    """Check that the KL's weight and its capacity reach their full values before the run ends.

    The capacity (option kl_capacity) is the value that the KL should have.
    """
    objective, last = rehearsal.asked.objective, rehearsal.asked.run.max_train_steps - 1
    held = rehearsal.task.objective.kl_target is not None
    weight = 1.0 if held else rehearsal.task.objective.kl_factor(last)
    growth = objective.kl_capacity_steps if objective.kl_capacity else 0
    capacity = min(last / growth, 1.0) if growth else 1.0
    return Check(
        name="kl-in-run",
        passed=min(weight, capacity) > 1 - 1e-6,
        value=f"{weight:.0%} of the KL's weight, {capacity:.0%} of its capacity",
        expected=f"the full weight and capacity within the {last + 1:,} updates of the run",
        advice="give kl_warmup_steps (or kl_capacity_steps) as a share of the run, such as 0.1",
    )
