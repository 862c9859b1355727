"""Check the training of a flow matching model before it starts (`train_flow.py --preflight`).

The preflight makes a few updates with the user's latents, precision and number of processes. It
prints a line for each check. It does not read or change the run's own folder.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from latentvae.priors.dit import sample_latents, velocity
from latentvae.priors.flow_matching import FlowSampling
from latentvae.priors.transformer import NO_CLASS
from latentvae.proofs.checks import Check
from latentvae.proofs.first_updates import (
    DRAWS,
    FirstUpdates,
    checkpoint_check,
    dropped_check,
    equal_ranks_check,
    items_check,
    run_checks,
    updates_check,
    weights_check,
)
from latentvae.tasks.flow.config import LatentFlowConfig
from latentvae.tasks.flow.task import FlowTask

LOSS = "loss/flow"
START_TOLERANCE = 0.05  # allowed relative difference of the loss
ROUND_TRIP = 1e-4  # largest difference of latents that are normalised and then scaled back


def flow_preflight(config: LatentFlowConfig, *, json: Path | None = None) -> int:
    """Check the first updates of a run, and print a line for each check.

    All ranks must call this function.

    Args:
        config: options of the run.
        json: file for the results of the checks. With None, no file is written.

    Returns:
        The exit code: 0 if all checks pass, 1 if a check fails.

    Raises:
        UserError: an option is wrong, or the latents cannot be used.
    """
    return run_checks(FlowTask, config, _checks, json=json)


def _checks(rehearsal: FirstUpdates) -> Iterator[Check]:
    """Yield the checks in the order of the printed lines. Every rank must run every check."""
    yield updates_check(rehearsal, loss=LOSS, words="squared error")
    yield weights_check(rehearsal)
    yield _scale(rehearsal)
    yield _start(rehearsal)
    yield items_check(rehearsal)
    yield equal_ranks_check(rehearsal)
    with rehearsal.training.evaluating():
        yield _direction(rehearsal)
        if rehearsal.task.condition != "none":
            yield _condition(rehearsal)
    if rehearsal.task.condition != "none":
        yield _dropped(rehearsal)
    yield checkpoint_check(rehearsal, loss=LOSS)


def _example(rehearsal: FirstUpdates) -> tuple[Tensor, Tensor | list[str]]:
    """Return normalised latents of up to 64 validation images, and their classes or captions."""
    table = rehearsal.task.data.validation
    return rehearsal.task.moved(table.rows(range(min(len(table), 64))))


def _scale(rehearsal: FirstUpdates) -> Check:
    """Check that normalised latents have about unit variance, and can be scaled back."""
    x, _ = _example(rehearsal)
    norm = rehearsal.task.data.normalization
    error = (norm.apply(norm.invert(x)) - x).abs().max().item()
    std = x.std().item()
    return Check(
        name="latents",
        passed=0.5 <= std <= 2.0 and error < ROUND_TRIP,
        value=f"standard deviation {std:.3f}, error {error:.1g} after scaling back and forth",
        expected=f"0.5 to 2, and an error below {ROUND_TRIP:g}",
        advice="Give --normalization channel.",
    )


def _start(rehearsal: FirstUpdates) -> Check:
    """Check that the untrained network predicts a velocity of 0.

    The loss of a prediction of 0 is the mean square of the true velocity. This mean square is 1
    (from the noise) plus the mean square of the latents.
    """
    table, norm = rehearsal.task.data.validation, rehearsal.task.data.normalization
    expected = 1 + norm.apply(table.z.float()).square().mean().item()
    return Check(
        name="loss-at-start",
        passed=math.isclose(rehearsal.start["validation/loss"], expected, rel_tol=START_TOLERANCE),
        value=rehearsal.start["validation/loss"],
        expected=f"about {expected:.3f}, the loss of a predicted velocity of 0",
        advice="The weights of the output layer must be 0 at the start.",
    )


@torch.no_grad()
def _direction(rehearsal: FirstUpdates) -> Check:
    """Check with an exact velocity that sampling runs from noise to latents.

    A network that returns the velocity `noise - latent` must move the noise exactly to the latent.
    """
    x, _ = _example(rehearsal)
    shift, errors = rehearsal.task.shift, []
    for solver in ("euler", "heun"):
        net = _Exact(x)
        options = FlowSampling(steps=4, solver=solver)  # type: ignore[arg-type]
        none = torch.full((len(x),), NO_CLASS)
        found = sample_latents(net, none, options=options, shift=shift)  # type: ignore[arg-type]
        errors.append((found - x).abs().max().item())
    return Check(
        name="sampling",
        passed=max(errors) < ROUND_TRIP,
        value=max(errors),
        expected=f"sampling with the exact velocity gives the latents within {ROUND_TRIP:g}",
        advice="The sign of the velocity or of the time differs between training and sampling.",
    )


class _Exact(torch.nn.Module):
    """A network that knows the latents x and returns the velocity (x_sigma - x) / sigma.

    x_sigma are the noisy latents that the network gets, and sigma is their noise level.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.device = x, x.device
        self.config = type(
            "Config",
            (),
            {"in_channels": x.shape[1], "sample_size": x.shape[2], "num_embeds_ada_norm": 0},
        )

    def forward(self, hidden: Tensor, timestep: Tensor, class_labels: Tensor) -> "_Exact":
        self.sample = (hidden - self.x) / (timestep / 1000).view(-1, 1, 1, 1)
        return self


@torch.no_grad()
def _condition(rehearsal: FirstUpdates) -> Check:
    """Check that the class or the caption changes the predicted velocity."""
    task = rehearsal.task
    x, known = _example(rehearsal)
    noise, sigma = torch.randn_like(x), torch.full((len(x),), 0.5, device=x.device)
    right, without = (
        velocity(task.net, noise, sigma, task.read(part)) for part in (known, task.nothing(len(x)))
    )
    difference = (right - without).abs().max().item()
    return Check(
        name="condition",
        passed=difference > 0,
        value=difference,
        expected="the condition changes the velocity",
        advice="The model would ignore the class or the caption.",
    )


def _dropped(rehearsal: FirstUpdates) -> Check:
    """Check that the share of dropped classes or captions is near the requested share."""
    task = rehearsal.task
    if task.condition == "text":
        texts = task.drop_condition(["a"] * DRAWS)
        dropped = torch.tensor([text == "" for text in texts])
    else:
        classes = torch.zeros(DRAWS, dtype=torch.int64, device=task.device)
        dropped = task.drop_condition(classes) == NO_CLASS
    return dropped_check(dropped, task.config.flow.condition_dropout)
