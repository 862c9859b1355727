"""Check the training of a prior before it starts (`train_prior.py --preflight`).

The preflight makes a few updates with the user's tokens, precision and number of processes. It
prints a line for each check. It does not read or change the run's own folder.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from latentvae.priors.sampling import Steps
from latentvae.priors.transformer import NO_CLASS, Text
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
from latentvae.tasks.prior.config import PriorConfig
from latentvae.tasks.prior.task import PriorTask

LOSS = "loss/bits_per_token"
START_TOLERANCE = 0.05  # allowed difference in bits per token
CACHE_TOLERANCE = 1e-4  # largest difference of logits


def prior_preflight(config: PriorConfig, *, json: Path | None = None) -> int:
    """Check the first updates of a run, and print a line for each check.

    All ranks must call this function.

    Args:
        config: options of the run.
        json: file for the results of the checks. With None, no file is written.

    Returns:
        The exit code: 0 if all checks pass, 1 if a check fails.

    Raises:
        UserError: an option is wrong, or the tokens cannot be used.
    """
    return run_checks(PriorTask, config, _checks, json=json)


def _checks(rehearsal: FirstUpdates) -> Iterator[Check]:
    """Yield the checks in the order of the printed lines. Every rank must run every check."""
    yield updates_check(rehearsal, loss=LOSS, words="bits per token")
    yield weights_check(rehearsal)
    yield _start(rehearsal)
    yield items_check(rehearsal)
    yield equal_ranks_check(rehearsal)
    with rehearsal.training.evaluating():
        yield _causal(rehearsal)
        yield _cache(rehearsal)
        if rehearsal.task.condition != "none":
            yield _condition(rehearsal)
    if rehearsal.task.condition != "none":
        yield _dropped(rehearsal)
    if rehearsal.task.trains_text:
        yield _text_learns(rehearsal)
    yield checkpoint_check(rehearsal, loss=LOSS)


def _start(rehearsal: FirstUpdates) -> Check:
    uniform = math.log2(rehearsal.task.net.config["num_codes"])
    return Check(
        name="loss-at-start",
        passed=abs(rehearsal.start["validation/bits_per_token"] - uniform) < START_TOLERANCE,
        value=f"{rehearsal.start['validation/bits_per_token']:.3f} bits per token",
        expected=f"log2 of the number of codes, {uniform:.3f}",
        advice="The untrained network must give all codes the same probability.",
    )


def _example(rehearsal: FirstUpdates) -> tuple[Tensor, Tensor | None, Text | None]:
    """Return tokens, class and text of the first validation image, on the device."""
    table = rehearsal.task.data.validation
    return rehearsal.task.moved(table.rows([0]), table)


def _causal(rehearsal: FirstUpdates) -> Check:
    """Check by gradients that a token's logits depend on all earlier tokens, and on no other."""
    net, device = rehearsal.task.net, rehearsal.task.device
    indices, classes, text = _example(rehearsal)
    embedded: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    handle = net.tokens.register_forward_hook(keep)
    place = net.num_tokens // 2
    with torch.enable_grad():
        weights = torch.randn(net.config["num_codes"], device=device)
        (net(indices, classes, text).logits[0, place] * weights).sum().backward()
    handle.remove()
    net.zero_grad()

    gradient = embedded[0].grad
    assert gradient is not None
    reached = gradient[0].abs().sum(dim=1) > 0  # entry i is token i
    later, missing = int(reached[place:].sum()), int((~reached[:place]).sum())
    return Check(
        name="causal",
        passed=later == 0 and missing == 0,
        value=f"token {place} depends on {later} later tokens and misses {missing} earlier ones",
        expected="0 and 0",
        advice="The attention mask is wrong, so the bits per token would mean nothing.",
    )


@torch.no_grad()
def _cache(rehearsal: FirstUpdates) -> Check:
    """Check that sampling token by token (with a cache) gives the same logits as a single pass."""
    net = rehearsal.task.net
    indices, classes, text = _example(rehearsal)
    classes = torch.full((1,), NO_CLASS, device=indices.device) if classes is None else classes
    steps = Steps(net, classes, text)
    before = [None, *indices[:, :-1].unbind(dim=1)]
    cached = torch.stack([steps.logits(token) for token in before], dim=1)
    difference = (cached - net(indices, classes, text).logits).abs().max().item()
    return Check(
        name="cache",
        passed=difference < CACHE_TOLERANCE,
        value=difference,
        expected=f"logits of sampling and training differ by less than {CACHE_TOLERANCE:g}",
        advice="Samples would not come from the trained distribution.",
    )


@torch.no_grad()
def _condition(rehearsal: FirstUpdates) -> Check:
    """Check that the condition (class or caption) changes the logits."""
    net = rehearsal.task.net
    indices, classes, text = _example(rehearsal)
    difference = (net(indices, classes, text).logits - net(indices).logits).abs().max().item()
    return Check(
        name="condition",
        passed=difference > 0,
        value=difference,
        expected="the condition changes the logits",
        advice="The prior would ignore the class or the caption.",
    )


def _text_learns(rehearsal: FirstUpdates) -> Check:
    """Check that the loss has a gradient for every tensor of a text encoder that is trained."""
    task, table = rehearsal.task, rehearsal.task.data.train
    numbers = list(range(min(len(table), task.config.run.train_batch_size)))
    trained = task.learners["model"].module
    indices, _, words = task.moved(table.rows(numbers), table, encode=False)
    trained.zero_grad()
    trained(indices, None, words).backward()
    weights = dict(task.encoder.named_parameters())
    without = [name for name, p in weights.items() if p.grad is None or not p.grad.any()]
    trained.zero_grad()
    return Check(
        name="text-encoder",
        passed=not without,
        value=f"{len(without)} of {len(weights)} text encoder tensors without a gradient",
        expected="the loss has a gradient for every tensor of the text encoder",
        advice="The text encoder stays random. Compute its hidden states with gradients.",
    )


def _dropped(rehearsal: FirstUpdates) -> Check:
    """Check that the share of dropped classes or captions is near the requested share."""
    task, device = rehearsal.task, rehearsal.task.device
    share = task.config.prior.condition_dropout
    if task.condition == "class":
        classes, _ = task.drop_condition(torch.zeros(DRAWS, dtype=torch.int64), None)
        assert classes is not None
        dropped = classes == NO_CLASS
    else:
        mask = torch.ones(DRAWS, 1, dtype=torch.bool, device=device)
        _, text = task.drop_condition(None, Text(torch.zeros(DRAWS, 1, 1, device=device), mask))
        assert text is not None
        dropped = ~text.mask[:, 0]
    return dropped_check(dropped, share)
