"""Check the learning rate, and what the updates did to weights, averages and the discriminator."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from latentvae.losses.objective.adversarial_weight import adversarial_weight
from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.rehearsal import (
    DISCRIMINATOR_START,
    UPDATES,
    Rehearsal,
    Seen,
    trained,
)
from latentvae.proofs.preflight.schedule_checks import as_asked
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.update_step import MODEL


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    """Yield the checks of weights, optimizers, learning rate, precision, average, discriminator."""
    task = rehearsal.task
    yield weights(rehearsal)
    yield optimizer(rehearsal)
    yield cleared(rehearsal)
    yield learning_rate(rehearsal)
    yield precision(rehearsal)
    if rehearsal.training.averages:
        yield average(rehearsal)
    if task.discriminator is not None:
        yield discriminator_start(rehearsal)
        yield discriminator_ramp(rehearsal)
        yield discriminator_untouched(rehearsal)
        yield model_untouched(rehearsal)
        if task.config.discriminator.disc_adaptive_weight:
            yield adaptive_weight(rehearsal)


def updates(rehearsal: Rehearsal) -> Check:
    """Check that all gradients are finite. Without finite gradients, no other check makes sense."""
    finite = [seen.result.finite for seen in rehearsal.seen]
    return Check(
        name="updates",
        passed=finite == [True] * UPDATES,
        value=f"{sum(finite)} made",
        expected=f"{UPDATES} updates with finite gradients",
        advice="A gradient is NaN or infinite from the start. Look for NaN in the images or the "
        "pretrained weights, try --mixed_precision no, a lower learning_rate or disc_scale 0.",
    )


def weights(rehearsal: Rehearsal) -> Check:
    """Check that the weights have the dtype float32 and change in an update.

    If the weights were in bf16, most steps of a usual learning rate would be rounded to 0, so most
    weights would not change. A training script of diffusers casts its weights to bf16 by mistake.
    """
    # Examine the second update. In the first update, rounding the initial weights would look like a
    # step.
    seen = rehearsal.seen[1]
    moved, steps = [], []

    # steps of the weights that have a gradient
    for name, moment in seen.moments.items():
        change = (seen.after[name].double() - seen.before[name].double()).abs()
        learns = moment != 0
        moved.append(change[learns] > 0)
        steps.append(change[learns])

    # verdict
    share = torch.cat(moved).double().mean().item() if moved else 0.0
    step = torch.cat(steps).median().item() / seen.rates[0] if moved else 0.0
    dtypes = {str(p.dtype).removeprefix("torch.") for p in _all_parameters(rehearsal)}
    return Check(
        name="weights",
        passed=dtypes == {"float32"} and share > 0.5,  # in bf16, about 0.1 would change
        value=f"{', '.join(sorted(dtypes))}, {share:.1%} of the weights with a gradient "
        f"change, by {step:.2g} times the learning rate",
        expected="float32 weights that change wherever their gradient is not 0",
        advice="Keep the weights in float32 (mixed_precision bf16 casts only the computation). "
        "Raise the learning_rate if its steps are too small for float32.",
    )


def _all_parameters(rehearsal: Rehearsal) -> list[nn.Parameter]:
    learners = rehearsal.task.learners.values()
    return [p for learner in learners for p in learner.module.parameters()]


def optimizer(rehearsal: Rehearsal) -> Check:
    """Check that every parameter that should learn belongs to an optimizer.

    A parameter that belongs to no optimizer never learns. Training scripts sometimes forget
    to give the learned log-variance of the output to the optimizer.
    """
    missing: list[str] = []
    for learner in rehearsal.task.learners.values():
        missing += _not_in(learner.optimizer, trained(learner.module))
    return Check(
        name="optimizer",
        passed=not missing,
        value=", ".join(missing[:3]) or "all",
        expected="every trained parameter is in an optimizer",
        advice="Give these parameters to the optimizer, or freeze them by requires_grad_(False).",
    )


def _not_in(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> list[str]:
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in parameters.items() if id(p) not in known]


def cleared(rehearsal: Rehearsal) -> Check:
    """Check that no gradient is left after an update.

    A remaining gradient would be added to the gradient of the next update.
    """
    learners = rehearsal.task.learners.values()
    groups = [group for learner in learners for group in learner.optimizer.param_groups]
    left = sum(p.grad is not None and bool(p.grad.any()) for g in groups for p in g["params"])
    return Check(
        name="cleared",
        passed=left == 0,
        value=left,
        expected="0 gradients left over from the last update",
        advice="Zero the gradients of both optimizers after each update.",
    )


def learning_rate(rehearsal: Rehearsal) -> Check:
    """Check that the learning rate follows the schedule that the options describe.

    The check fails if the learning rate is scaled by the batch size. The check also fails if the
    schedule counts batches (micro-steps) or updates of the discriminator instead of updates of the
    run.
    """
    task, progress, asked = rehearsal.task, rehearsal.training.progress, rehearsal.asked
    warmup, total = asked.optimizer.lr_warmup_steps, asked.run.max_train_steps
    alone = asked.discriminator.disc_warmup_steps if task.discriminator is not None else 0
    pause = range(asked.discriminator_start, asked.discriminator_start + alone)
    points = {0, warmup // 2, warmup, (warmup + total) // 2, total - 1}
    points |= {pause.stop, pause.stop + warmup // 2, pause.stop + warmup}

    # the rates at these updates
    worst, at = 0.0, 0
    with as_asked(rehearsal):
        for update in sorted(point for point in points if point < total):
            progress.update = update
            rehearsal.updates.set_learning_rates()
            for name, learner in task.learners.items():
                peak, waits = asked.discriminator.disc_learning_rate, range(0)
                if name == MODEL:
                    peak, waits = asked.optimizer.learning_rate, pause
                stated = _stated_rate(update, peak, asked, waits)
                for group in learner.optimizer.param_groups:
                    difference = abs(group["lr"] - stated) / peak
                    worst, at = max((worst, at), (difference, update))

    follows = worst < 1e-9
    return Check(
        name="learning-rate",
        passed=follows,
        value="as stated" if follows else f"off by {worst:.2g} of the peak after update {at:,}",
        expected=f"{asked.optimizer.lr_scheduler} schedule after a warm-up, over {total:,} updates",
        advice="The learning rate is not what the options say. Do not scale learning_rate, and "
        "let the schedule count updates, not micro-steps or updates summed over processes.",
    )


def _stated_rate(update: int, peak: float, config: TrainConfig, pause: range) -> float:
    """Return the learning rate in `update` (from 0) that the help texts of the options describe.

    Args:
        pause: updates in which the model does not learn, because the discriminator learns alone.
            For the discriminator's learning rate, this range is empty.
    """
    warmup, total = config.optimizer.lr_warmup_steps, config.run.max_train_steps
    end = warmup + (len(pause) if pause.start < warmup else 0)
    own = update - sum(1 for waited in pause if waited < update)
    if own < warmup:
        return (own + 1) / warmup * peak
    if config.optimizer.lr_scheduler == "constant":
        return peak
    angle = math.pi * (update - end) / max(total - end, 1)
    return peak * math.cos(min(angle, math.pi) / 2) ** 2


def precision(rehearsal: Rehearsal) -> Check:
    """Check that the convolutions run in the requested precision.

    If a network is not called through the wrapper that Accelerate made, autocast has no effect:
    bf16 is requested but never used.
    """
    asked = rehearsal.training.accelerator.mixed_precision
    wanted = torch.bfloat16 if asked == "bf16" else torch.float32
    found = {str(dtype).removeprefix("torch.") for dtype in rehearsal.watch.dtypes}
    return Check(
        name="precision",
        passed=wanted in rehearsal.watch.dtypes,  # some operations use float32 even within autocast
        value=", ".join(sorted(found)),
        expected=f"convolutions in {str(wanted).removeprefix('torch.')}, by mixed_precision "
        f"{asked}",
        advice="Call the module that Accelerate prepared, not the network inside it.",
    )


def average(rehearsal: Rehearsal) -> Check:
    """Check that the weight average (EMA) is updated once per update of the model, in float32.

    An average in bf16 would not change, because its steps would be rounded to 0.
    """
    training, worst = rehearsal.training, 0.0
    for i, seen in enumerate(rehearsal.seen):
        worst = max(worst, _off_average(seen, i, training.config.optimizer.ema_decay))
    dtypes = {
        str(shadow.dtype).removeprefix("torch.")
        for shadow in training.averages[MODEL].shadow_params
    }
    return Check(
        name="average",
        passed=dtypes == {"float32"} and worst < 1e-4,
        value=f"{', '.join(sorted(dtypes))}, wrong by at most {worst:.2g} of a step",
        expected="a float32 average that follows each update of the model as ema_decay says",
        advice="Keep the average in float32 and update it once after each update of the model.",
    )


def _off_average(seen: Seen, update: int, ema_decay: float) -> float:
    """Return how far the new EMA is from `decay * old EMA + (1 - decay) * new weights`.

    The distance is divided by the distance of the new weights from the old EMA.
    """
    decay = min((1 + update) / (10 + update), ema_decay) if update else 0.0
    worst = 0.0
    for name, old in seen.before.items():
        if name.startswith("ema/"):
            now = seen.after["model/" + name.removeprefix("ema/")].double()
            expected = decay * old.double() + (1 - decay) * now
            apart = (seen.after[name].double() - expected).abs().max()
            step = (now - old.double()).abs().max().clamp(min=1e-30)
            rounding = 1e-6 * expected.abs().max()
            worst = max(worst, ((apart - rounding).clamp(min=0) / step).item())
    return worst


def discriminator_start(rehearsal: Rehearsal) -> Check:
    """Check that the discriminator learns from its first update on, and is not called before."""
    learned = [_changed(seen, "discriminator/") for seen in rehearsal.seen]
    called = [seen.discriminator_calls > 0 for seen in rehearsal.seen]
    expected = [i >= DISCRIMINATOR_START for i in range(UPDATES)]
    return Check(
        name="discriminator-start",
        passed=learned == expected and called == expected,
        value=f"discriminator called in updates {_numbers(called)}, trained in updates "
        f"{_numbers(learned)}",
        expected=f"called and trained in updates {_numbers(expected)} of {UPDATES}, not before",
        advice="Step the discriminator's optimizer in each update from disc_start on, and do not "
        "call the discriminator before.",
    )


def _numbers(happened: list[bool]) -> str:
    """Return the numbers (from 1) of the updates with a true value in `happened`, as text."""
    return ", ".join(str(i + 1) for i, did in enumerate(happened) if did) or "none"


def discriminator_ramp(rehearsal: Rehearsal) -> Check:
    """Check that the adversarial weight starts at 0 and grows to its full value.

    An untrained discriminator at full weight spoils what the model has learned. If
    disc_warmup_steps and disc_ramp_steps are 0, the check expects the full value from the start.
    """
    task, asked = rehearsal.task, rehearsal.asked
    options, objective = asked.discriminator, task.objective
    kept = objective.adversarial, task.progress.discriminator_start

    # the weight when it starts, and after it has grown to its full value
    objective.adversarial = adversarial_weight(options)
    task.progress.discriminator_start = asked.discriminator_start
    ramp = options.disc_warmup_steps, options.disc_ramp_steps
    found, expected = [], [0.0 if any(ramp) else options.disc_scale, options.disc_scale]
    for update in (asked.discriminator_start, asked.discriminator_start + sum(ramp)):
        adversary = task.adversary(update)
        found.append(None if adversary is None else adversary.factor)
    objective.adversarial, task.progress.discriminator_start = kept

    return Check(
        name="discriminator-ramp",
        passed=found == expected,
        value=f"{found[0]}, then {found[1]}",
        expected=f"an adversarial weight of {expected[0]:g} at disc_start, and of {expected[1]:g} "
        f"after {sum(ramp):,} more updates",
        advice="Let the adversarial weight grow from 0 over disc_ramp_steps, counted in updates "
        "from disc_start.",
    )


def _changed(seen: Seen, group: str) -> bool:
    return any(
        not torch.equal(old, seen.after[name])
        for name, old in seen.before.items()
        if name.startswith(group)
    )


def discriminator_untouched(rehearsal: Rehearsal) -> Check:
    """Check that the model's loss leaves no gradient on the discriminator.

    Such a gradient would train the discriminator to classify reconstructions as real.
    """
    return Check(
        name="discriminator-untouched",
        passed=rehearsal.watch.on_discriminator == 0,
        value=rehearsal.watch.on_discriminator,
        expected="0 gradients on the discriminator from the model's loss",
        advice="Take the gradient only at the reconstruction (torch.autograd.grad), or freeze the "
        "discriminator while the model learns.",
    )


def model_untouched(rehearsal: Rehearsal) -> Check:
    """Check that the discriminator's own loss sends no gradient to the model.

    Without `detach`, the discriminator's loss would train the model to be recognised as fake.
    """
    return Check(
        name="model-untouched",
        passed=rehearsal.watch.on_model == 0,
        value=rehearsal.watch.on_model,
        expected="0 gradients on the model from the discriminator's loss",
        advice="Detach the reconstructions that the discriminator learns from.",
    )


def adaptive_weight(rehearsal: Rehearsal) -> Check:
    """Check that the adaptive weight of the adversarial loss is not above its cap.

    Without a cap, the weight grows without bound when the discriminator's gradient vanishes.
    """
    config = rehearsal.task.config
    elements = min(config.data.image_channels * h * w for h, w in config.train_sizes)
    cap = rehearsal.task.objective.adversarial.cap_at(elements)
    found: list[Tensor] = [
        values["discriminator/adaptive_weight"]
        for seen in rehearsal.seen[DISCRIMINATOR_START:]
        for values in seen.result.values
        if "discriminator/adaptive_weight" in values
    ]
    largest = torch.stack(found).max().item() if found else math.nan
    return Check(
        name="adaptive-weight",
        passed=0.0 <= largest <= cap * (1 + 1e-6),
        value=largest,
        expected=f"finite, from 0 to disc_weight_cap {cap:g}",
        advice="Clamp the adaptive weight to disc_weight_cap, and keep its denominator above 0.",
    )
