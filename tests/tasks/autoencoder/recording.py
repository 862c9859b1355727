"""A run of seconds, with everything that its updates change written down."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from latentvae.engine import loop
from latentvae.engine.training import Training
from latentvae.engine.updates import UpdateResult, Updates


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update, seen from outside.

    Attributes:
        before, after: `model/`, `discriminator/`, `ema/` and optimiser tensors by name.
        rates: learning rates it used, of the model and the discriminator.
        factor: weight of the adversarial term, None before the discriminator starts.
        norm: largest of the gradient norms that the optimisers were given; None if skipped.
    """

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    rates: tuple[float, ...]
    factor: float | None
    norm: float | None


@dataclass
class Recording:
    """What a run was made of, and its updates in order; ``inside`` is on while one is made."""

    updates: list[Update] = field(default_factory=list)
    training: Training = field(init=False)
    started: bool = False
    inside: bool = False

    @property
    def task(self) -> Any:
        return self.training.task


def tensors_of(training: Training) -> dict[str, Tensor]:
    """Copies of all that an update may change."""
    found: dict[str, Tensor] = {}
    for kind, learner in training.task.learners.items():
        found |= {f"{kind}/{name}": p for name, p in learner.module.named_parameters()}
        for i, entries in enumerate(learner.optimizer.state.values()):
            found |= {f"{kind}_optimizer/{i}/{key}": value for key, value in entries.items()}
    averages = training.average_of_weights()
    weights = training.task.learners["model"].module.named_parameters()
    found |= {f"ema/{n.removeprefix('net.')}": averages[p] for n, p in weights if p in averages}
    return {name: value.detach().clone() for name, value in found.items()}


@contextmanager
def recorded() -> Iterator[Recording]:
    """Write down the run that is made inside the block."""
    recording = Recording()
    build, update, step = loop.build_training, Updates.make, Updates.step
    given: list[float] = []

    def building(*args: Any, **kwargs: Any) -> Training:
        recording.training = build(*args, **kwargs)
        return recording.training

    def stepping(self: Updates, learning: Sequence[str]) -> None:
        learners = self.training.task.learners
        recording.inside = False
        given.append(max(_norm(learners[name].module) for name in learning))
        recording.inside = True
        step(self, learning)

    def updating(self: Updates, batches: Any) -> UpdateResult:
        training: Any = self.training
        before = tensors_of(training)
        recording.started = True
        adversary = training.task.adversary(self.progress.update)
        given.clear()
        recording.inside = True
        result = update(self, batches)
        recording.inside = False
        optimizers = [learner.optimizer for learner in training.task.learners.values()]
        recording.updates.append(
            Update(
                before=before,
                after=tensors_of(training),
                rates=tuple(optimizer.param_groups[0]["lr"] for optimizer in optimizers),
                factor=None if adversary is None else adversary.factor,
                norm=given[0] if given else None,
            )
        )
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_training", building)
        patch.setattr(Updates, "step", stepping)
        patch.setattr(Updates, "make", updating)
        yield recording


def changed(update: Update, group: str) -> bool:
    """Whether the update changed any tensor whose name starts with ``group``."""
    names = {name for name in update.after if name.startswith(group)}
    assert names, group
    return any(
        name not in update.before or not torch.equal(update.before[name], update.after[name])
        for name in names
    )


def _norm(module: torch.nn.Module) -> float:
    grads = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return torch.stack(grads).norm().item()
