"""Check the training of a variational autoencoder before it starts (`train_vae.py --preflight`).

The preflight makes a few updates with the user's images, precision and number of processes. It
prints a line for each check. It does not read or change the run's own folder.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from latentvae.models.bound import Bound
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
from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.likelihood.task import LikelihoodTask

LOSS = "loss/total"
SAMPLES = 8  # number of latents per image for the comparison of the bounds


def likelihood_preflight(config: LikelihoodConfig, *, json: Path | None = None) -> int:
    """Check the first updates of a run, and print a line for each check.

    All ranks must call this function.

    Args:
        config: options of the run.
        json: file for the results of the checks. With None, no file is written.

    Returns:
        The exit code: 0 if all checks pass, 1 if a check fails.

    Raises:
        UserError: an option is wrong, or the images cannot be used.
    """
    return run_checks(LikelihoodTask, config, _checks, json=json)


def _checks(rehearsal: FirstUpdates) -> Iterator[Check]:
    """Yield the checks in the order of the printed lines. Every rank must run every check."""
    yield updates_check(rehearsal, loss=LOSS, words="total loss")
    yield weights_check(rehearsal)
    yield items_check(rehearsal)
    yield equal_ranks_check(rehearsal)
    yield _gradients(rehearsal)
    yield _values(rehearsal)
    yield _bounds(rehearsal)
    yield checkpoint_check(rehearsal, loss=LOSS)
    yield falls_check(
        rehearsal,
        loss=LOSS,
        advice="Give a lower --learning_rate, or no KL warm-up in the first updates.",
    )


def _gradients(rehearsal: FirstUpdates) -> Check:
    """Check that the gradient of one batch reaches all weights."""
    task: LikelihoodTask = rehearsal.task
    task.micro_step(next(iter(task.batches(start_step=0))), 1)
    missing = [n for n, p in task.net.named_parameters() if p.requires_grad and p.grad is None]
    task.learners["model"].optimizer.zero_grad()
    return Check(
        name="gradients",
        passed=not missing,
        value=", ".join(missing[:3]) or "all weights",
        expected="a gradient for all weights",
        advice="A part of the network would not learn.",
    )


def _values(rehearsal: FirstUpdates) -> Check:
    """Check that the images have only pixel values that the likelihood allows."""
    task: LikelihoodTask = rehearsal.task
    images = task.prepared_images(next(iter(task.batches(start_step=0))))
    error = (images - task.net.pixels.rounded(images)).abs().max().item()
    return Check(
        name="values",
        passed=error < 1e-4,
        value=error,
        expected=f"pixel values within 1e-4 of one of the {task.net.pixels.levels} allowed values",
        advice="For other pixel values, the likelihood is not a probability. Check likelihood and "
        "binarize.",
    )


@torch.no_grad()
def _bounds(rehearsal: FirstUpdates) -> Check:
    """Check that the ELBO is at most the importance-weighted bound from the same latents."""
    task: LikelihoodTask = rehearsal.task
    images = task.prepared_images(next(iter(task.batches(start_step=0))))
    bound: Bound = task.net(images, samples=SAMPLES)
    elbo = bound.log_weights().mean(0)
    gap = (bound.importance() - elbo).min().item()
    return Check(
        name="bounds",
        passed=math.isfinite(gap) and gap > -1e-3,
        value=gap,
        expected="the importance-weighted bound minus the ELBO is at least 0 nats",
        advice="The values log_likelihood and log_ratio of the bound are inconsistent.",
    )
