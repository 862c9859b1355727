"""Check the run of a prior before it starts (`train_prior.py --preflight`).

The check makes a few updates with the user's tokens, precision and processes, and prints a line for
each check. It neither reads nor writes the run's own folder.
"""

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentvae.compute.memory import keep_freed_memory
from latentvae.config.presets import checked
from latentvae.distributed import barrier, from_main, gather_objects, is_main
from latentvae.engine.checkpoint_content import restore, take_snapshot
from latentvae.engine.checkpoint_files import PREFIX, load_checkpoint, save_checkpoint
from latentvae.engine.processes import end_accelerator, start_accelerator
from latentvae.engine.resume import settle_precision
from latentvae.engine.run_options import check_options
from latentvae.engine.training import Training, build_training
from latentvae.engine.updates import UpdateResult, Updates
from latentvae.priors.sampling import Steps
from latentvae.priors.transformer import NO_CLASS, Text
from latentvae.proofs.checks import Check, check_json_file, conclude, wrapped
from latentvae.proofs.preflight.preflight import joined, temporary_folder
from latentvae.proofs.preflight.rehearsal import fingerprints
from latentvae.tasks.prior.config import PriorConfig
from latentvae.tasks.prior.task import PriorTask

UPDATES = 3
START_TOLERANCE = 0.05  # bits per token
LOSS_TOLERANCE = 1e-2  # relative difference of a repeated loss on a GPU
CACHE_TOLERANCE = 1e-4  # largest difference of logits
DRAWS = 4096  # conditions that are drawn to measure how many are dropped


@dataclass(kw_only=True)
class PriorRehearsal:
    """The first updates of a run, and what was seen of them."""

    task: PriorTask
    training: Training
    start_bits: float
    results: list[UpdateResult]
    before: dict[str, str]
    after: dict[str, str]
    items: list[int]


def prior_preflight(config: PriorConfig, *, json: Path | None = None) -> int:
    """Check a run, and print a line for each check. All ranks must call this.

    Args:
        config: options of the run.
        json: file for the results of the checks.

    Returns:
        The exit code: 0 if all checks hold, 1 if one failed.

    Raises:
        UserError: an option is wrong, or the tokens cannot be used.
    """
    check_json_file(json)
    with contextlib.ExitStack() as stack:
        return _report(_rehearse(config, stack), json=json)


def _report(rehearsal: PriorRehearsal, *, json: Path | None) -> int:
    """Make the checks and print their results. Return the exit code on all ranks."""
    show, checks = rehearsal.training.accelerator.print, []
    show(wrapped(f"preflight of {rehearsal.task.config.config}: made {UPDATES} updates"))
    for check in _checks(rehearsal):
        checks.append(joined(check))
        show(checks[-1], flush=True)
    code = from_main(conclude(checks, json_file=json) if is_main() else 0)
    barrier()  # no rank may end its process group while another rank still waits
    return code


def _rehearse(config: PriorConfig, stack: contextlib.ExitStack) -> PriorRehearsal:
    # the run, in a temporary folder
    nowhere = Path(tempfile.gettempdir()) / "latentvae-preflight"  # there is no run at this path
    config = settle_precision(checked(config), nowhere)
    check_options(config.run)
    task = PriorTask(
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
        start_bits = task.validate(0)["validation/bits_per_token"]
    before, batches = fingerprints(training), iter(task.batches(start_step=0))
    results = [Updates(training).make(batches) for _ in range(UPDATES)]
    steps = task.order(
        rank=accelerator.process_index, processes=accelerator.num_processes, start=0, stop=1
    )
    return PriorRehearsal(
        task=task,
        training=training,
        start_bits=start_bits,
        results=results,
        before=before,
        after=fingerprints(training),
        items=[index for _, index in steps[0]],
    )


def _checks(rehearsal: PriorRehearsal) -> Iterator[Check]:
    """Yield the checks in order. All ranks must take all of them."""
    yield _updates(rehearsal)
    yield _weights(rehearsal)
    yield _start(rehearsal)
    yield _ranks(rehearsal)
    yield _equal_ranks(rehearsal)
    with rehearsal.training.evaluating():
        yield _causal(rehearsal)
        yield _cache(rehearsal)
        if rehearsal.task.condition != "none":
            yield _condition(rehearsal)
    if rehearsal.task.condition != "none":
        yield _dropped(rehearsal)
    if rehearsal.task.trains_text:
        yield _text_learns(rehearsal)
    yield _checkpoint(rehearsal)


def _updates(rehearsal: PriorRehearsal) -> Check:
    losses = [result.values[0]["loss/bits_per_token"].item() for result in rehearsal.results]
    return Check(
        name="updates",
        passed=all(result.finite for result in rehearsal.results),
        value=", ".join(f"{loss:.3f}" for loss in losses) + " bits per token",
        expected="finite losses and gradients",
        advice="Give a lower --learning_rate, or --mixed_precision no.",
    )


def _weights(rehearsal: PriorRehearsal) -> Check:
    same = [n for n, value in rehearsal.before.items() if rehearsal.after[n] == value]
    return Check(
        name="weights",
        passed=not same,
        value=f"{', '.join(same)} did not change" if same else "all changed",
        expected="weights, optimizer and average change",
        advice="The optimizer does not train the network. Look at --learning_rate.",
    )


def _start(rehearsal: PriorRehearsal) -> Check:
    uniform = math.log2(rehearsal.task.net.config["num_codes"])
    return Check(
        name="loss-at-start",
        passed=abs(rehearsal.start_bits - uniform) < START_TOLERANCE,
        value=f"{rehearsal.start_bits:.3f} bits per token",
        expected=f"log2 of the number of codes, {uniform:.3f}",
        advice="The untrained network must find all codes equally likely.",
    )


def _ranks(rehearsal: PriorRehearsal) -> Check:
    parts: list[list[int]] = gather_objects(rehearsal.items)
    shared = sum(map(len, parts)) - len(set().union(*parts))
    return Check(
        name="images",
        passed=shared == 0,
        value=f"{shared} images that two processes read in the same update",
        expected="0",
        advice="Each process must read its own images.",
    )


def _equal_ranks(rehearsal: PriorRehearsal) -> Check:
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


def _example(rehearsal: PriorRehearsal) -> tuple[Tensor, Tensor | None, Text | None]:
    """Return tokens, class and text of the first validation image, on the device."""
    table = rehearsal.task.data.validation
    return rehearsal.task.moved(table.rows([0]), table)


def _causal(rehearsal: PriorRehearsal) -> Check:
    """Check by gradients that each token depends on all tokens before it, and on no other."""
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
def _cache(rehearsal: PriorRehearsal) -> Check:
    """Check that sampling token by token has the logits of one pass over all tokens."""
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
        expected=f"logits of sampling within {CACHE_TOLERANCE:g} of those of training",
        advice="Samples would not come from the trained distribution.",
    )


@torch.no_grad()
def _condition(rehearsal: PriorRehearsal) -> Check:
    """Check that the condition changes the logits."""
    net = rehearsal.task.net
    indices, classes, text = _example(rehearsal)
    difference = (net(indices, classes, text).logits - net(indices).logits).abs().max().item()
    return Check(
        name="condition",
        passed=difference > 0,
        value=difference,
        expected="the condition changes the logits",
        advice="The prior would ignore its condition.",
    )


def _text_learns(rehearsal: PriorRehearsal) -> Check:
    """Check that the gradient of the loss reaches every weight of the text encoder that learns."""
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
        value=f"{len(without)} of {len(weights)} tensors without a gradient",
        expected="the loss has a gradient for every tensor of the text encoder",
        advice="The text encoder stays random. Compute its states with gradients.",
    )


def _dropped(rehearsal: PriorRehearsal) -> Check:
    """Check the share of dropped conditions, within four standard deviations."""
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
    found = dropped.float().mean().item()
    return Check(
        name="condition-dropout",
        passed=abs(found - share) <= 4 * math.sqrt(share * (1 - share) / DRAWS),
        value=found,
        expected=f"about {share:g} of the conditions are dropped",
        advice="Guidance needs a prior that has learned without condition.",
    )


def _checkpoint(rehearsal: PriorRehearsal) -> Check:
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
        losses = [result.values[0]["loss/bits_per_token"].item() for result in (first, second)]
        differs = [] if math.isclose(*losses, rel_tol=LOSS_TOLERANCE) else ["losses"]
    return Check(
        name="checkpoint",
        passed=not differs,
        value=f"{', '.join(differs)} differ" if differs else "next update repeated",
        expected="a restored run repeats the next update" + " to the bit" * exact,
        advice="A resumed run would give other weights. `latentvae verify-resume` shows more.",
    )
