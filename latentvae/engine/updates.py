"""Make one update: micro-steps, clipping, one host sync, optimizers, averages, controllers.

Controllers are parts of the task that adapt values such as loss weights.

The code that calls `Updates.make` writes the logs and checkpoints. The command `preflight` uses
this module for its updates too.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.distributed import all_reduce_max, all_reduce_mean, rank
from latentvae.engine.progress import Progress
from latentvae.engine.randomness import Stream, seed_everything
from latentvae.engine.schedule import learning_rate
from latentvae.engine.training import Training


@dataclass
class UpdateResult:
    """The outcome of one update: finiteness, signals and values to log.

    Attributes:
        finite: whether all gradients of all ranks were finite, and no gradient norm was above
            skip_grad_norm. If `finite` is False, the update changed only counters, not weights.
        norms: norms of the gradients before clipping, by log name.
        signal: number of a process signal (such as SIGTERM) that some rank has received, or 0.
        values: values to log for each micro-step and for the update: scalars on the device by log
            name.
        keys: for each micro-step's batch, the values from which `Task.names` computes the names of
            the training samples.
    """

    finite: bool = True
    norms: dict[str, Tensor] = field(default_factory=dict)
    signal: int = 0
    values: list[dict[str, Tensor]] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)


class Updates:
    """An object that makes the updates of a run and counts them.

    Args:
        training: the training whose weights are updated.
        requested: function that returns the number of the process signal (such as SIGTERM) that
            this rank has received, or 0.
    """

    def __init__(self, training: Training, *, requested: Callable[[], int] = lambda: 0) -> None:
        self.training = training
        self.requested = requested

    @property
    def progress(self) -> Progress:
        return self.training.progress

    def make(self, batches: Iterator[Any]) -> UpdateResult:
        """Make one update of the modules that the task selects. All ranks call this method.

        Raises:
            ValueError: the task names no module (learner) for this update.
        """
        task, progress, result = self.training.task, self.training.progress, UpdateResult()
        learning = task.learning(progress.update)
        if not learning:
            raise ValueError(
                "A task must name a learner (module and optimizer) for each update (got none)."
            )
        self.set_learning_rates()

        # gradients
        statistics = [buffer.clone() for buffer in self._batch_norm_buffers]
        micro_steps = self.training.config.run.gradient_accumulation_steps
        for i in range(micro_steps):
            batch = next(batches)
            result.keys.append(task.keys(batch))
            with self._synchronised(i == micro_steps - 1):
                result.values.append(self.micro_step(batch))
            progress.micro_step += 1
        norms = result.norms = self._clip(learning)

        # the update's only host synchronisation
        measured = task.measured(result.values, progress.update)
        result.finite, result.signal, means = self._verdict(norms, measured)

        # weights, averages, controllers
        if result.finite:
            self.step(learning)
            moved = task.after_update(
                progress.update,
                values=result.values,
                means=means,
                averages=self.training.average_of_weights(),
            )
            result.values += [norms, moved]
        else:
            for buffer, before in zip(self._batch_norm_buffers, statistics, strict=True):
                buffer.copy_(before)
        task.end_update()
        for learner in task.learners.values():
            learner.optimizer.zero_grad()

        # counters
        progress.skipped += not result.finite
        progress.skipped_in_a_row = 0 if result.finite else progress.skipped_in_a_row + 1
        progress.update += 1
        return result

    @cached_property
    def _batch_norm_buffers(self) -> list[Tensor]:
        """Return the running statistics of all batch norms, which a forward pass changes."""
        return [
            buffer
            for learner in self.training.task.learners.values()
            for module in learner.module.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]

    @cached_property
    def _parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each learner (a module and its optimizer), collected once."""
        learners = self.training.task.learners
        return {name: list(learner.module.parameters()) for name, learner in learners.items()}

    @cached_property
    def _averaged(self) -> dict[str, list[nn.Parameter]]:
        """Return the averaged parameters of each learner (module, optimizer), collected once."""
        return {
            name: list(self.training.averaged(name).parameters()) for name in self.training.averages
        }

    def micro_step(self, batch: Any) -> dict[str, Tensor]:
        """Seed the random generators, add the gradients of one batch, and return values to log.

        The random numbers depend on seed, micro-step and rank.
        """
        seed, progress = self.training.config.run.seed, self.training.progress
        seed_everything(Stream.MICRO_STEP, seed, progress.micro_step, rank())
        return self.training.task.micro_step(batch, progress.update)

    def set_learning_rates(self) -> None:
        """Set the learning rates of the next update."""
        config, update = self.training.config, self.training.progress.update
        task = self.training.task
        for name, learner in task.learners.items():
            for group in learner.optimizer.param_groups:
                group["lr"] = learning_rate(
                    update, peak=learner.rate, config=config, pause=task.pause(name)
                )

    def step(self, learning: Sequence[str]) -> None:
        """Step the optimizers and the weight averages of the modules named in `learning`."""
        learners = self.training.task.learners
        for name in learning:
            learners[name].optimizer.step()
        for name, average in self.training.averages.items():
            if name in learning:
                average.step(self._averaged[name])

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Inside this context, let DDP reduce gradients over ranks only if `last` is True.

        `last` says whether the micro-step is the last one of the update.
        """
        with contextlib.ExitStack() as stack:
            if not last:
                for learner in self.training.task.learners.values():
                    stack.enter_context(self.training.accelerator.no_sync(learner.prepared))
            yield

    def _clip(self, learning: Sequence[str]) -> dict[str, Tensor]:
        """Clip the gradients. Return their norms before clipping, by log name."""
        largest = self.training.config.optimizer.max_grad_norm
        return {
            f"grad/{name}": clip_gradients(self._parameters[name], largest) for name in learning
        }

    def _verdict(self, norms: dict[str, Tensor], measured: Tensor) -> tuple[bool, int, list[float]]:
        """Find out whether the update is finite on all ranks, with one host synchronisation.

        Returns:
            First, whether all gradients on all ranks are finite, with norms of at most
            skip_grad_norm. Second, the process signal that a rank has received (or 0). Third, the
            means over ranks of the values that the task measured.
        """
        largest = self.training.config.optimizer.skip_grad_norm or torch.inf
        every = torch.stack(list(norms.values()))
        finite = (every.isfinite() & (every <= largest)).all()
        signal = torch.full_like(finite, self.requested(), dtype=torch.float32)
        verdict = all_reduce_max(torch.stack([(~finite).float(), signal]))
        if len(measured):
            verdict = torch.cat([verdict, all_reduce_mean(measured)])
        not_finite, signal, *means = verdict.tolist()
        return not_finite == 0, int(signal), means


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the joint norm of all gradients, in place. Return the norm before clipping, a scalar.

    The norm is not finite if any gradient is not finite.
    """
    parameters = list(parameters)
    # Without any gradient, torch returns a zero on the CPU. This zero is moved to the device.
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.to(parameters[0].device)
