"""A run of seconds, with everything that its updates change written down."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from latentvae.tasks.autoencoder import loop
from latentvae.tasks.autoencoder.run import Run
from latentvae.tasks.autoencoder.update import Adversary
from latentvae.tasks.autoencoder.updates import Made, Updates


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update, seen from outside.

    Attributes:
        before, after: `model/`, `critic/`, `ema/` and optimiser tensors by name.
        rates: learning rates it used, of the model and the critic.
        factor: weight of the adversarial term, None before the critic starts.
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
    run: Run = field(init=False)
    progress: Any = None
    inside: bool = False


def tensors_of(run: Run) -> dict[str, Tensor]:
    """Copies of all that an update may change."""
    found = {f"model/{name}": p for name, p in run.wrapper.named_parameters()}
    for name, optimizer in (("model", run.optimizer), ("critic", run.critic_optimizer)):
        for i, entries in enumerate(optimizer.state.values() if optimizer is not None else ()):
            found |= {f"{name}_optimizer/{i}/{key}": value for key, value in entries.items()}
    if run.critic is not None:
        found |= {f"critic/{name}": p for name, p in run.critic.named_parameters()}
    if run.ema is not None:
        names = [name for name, _ in run.net.named_parameters()]
        found |= dict(zip((f"ema/{n}" for n in names), run.ema.shadow_params, strict=True))
    return {name: value.detach().clone() for name, value in found.items()}


@contextmanager
def recorded() -> Iterator[Recording]:
    """Write down the run that is made inside the block."""
    recording = Recording()
    build, update, step = loop.build_run, Updates.make, Updates.step
    given: list[float] = []

    def building(*args: Any, **kwargs: Any) -> Run:
        recording.run = build(*args, **kwargs)
        return recording.run

    def stepping(self: Updates, adversary: Adversary | None) -> None:
        modules = [self.run.wrapper, *([adversary.critic] if adversary is not None else [])]
        recording.inside = False
        given.append(max(_norm(module) for module in modules))
        recording.inside = True
        step(self, adversary)

    def updating(self: Updates, batches: Any) -> Made:
        run, before = self.run, tensors_of(self.run)
        recording.progress = self.progress
        adversary = self.adversary()
        given.clear()
        recording.inside = True
        result = update(self, batches)
        recording.inside = False
        optimizers = [o for o in (run.optimizer, run.critic_optimizer) if o is not None]
        recording.updates.append(
            Update(
                before=before,
                after=tensors_of(run),
                rates=tuple(optimizer.param_groups[0]["lr"] for optimizer in optimizers),
                factor=None if adversary is None else adversary.factor,
                norm=given[0] if given else None,
            )
        )
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_run", building)
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
