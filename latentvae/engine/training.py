"""Build a training: a task with its processes, weight averages and progress."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn

from latentvae.config.run_config import JobConfig
from latentvae.engine.progress import Progress
from latentvae.engine.randomness import Stream, seed_everything
from latentvae.engine.task import Task
from latentvae.engine.weight_average import WeightAverage, averaged_weights


@dataclass(kw_only=True)
class Training:
    """A built task with its processes, weight averages and progress.

    Attributes:
        task: the task, which defines what is trained.
        folder: the run's folder.
        accelerator: the `Accelerator`, which knows the processes and the device.
        averages: weight averages by the name of their learner (a module with its optimizer). A
            learner may have no average.
        progress: counters of the updates and micro-steps done.
    """

    task: Task
    folder: Path
    accelerator: Accelerator
    averages: dict[str, WeightAverage]
    progress: Progress = field(default_factory=Progress)

    @property
    def config(self) -> JobConfig:
        return self.task.config

    @property
    def items_per_update(self) -> int:
        """Number of training samples in one update, summed over all processes."""
        options = self.config.run
        per_process = options.train_batch_size * options.gradient_accumulation_steps
        return per_process * self.accelerator.num_processes

    def averaged(self, name: str) -> nn.Module:
        """Return the part of a learner's module whose weights are averaged."""
        part = self.task.learners[name].averaged
        assert part is not None, name
        return part

    def average_of_weights(self) -> dict[nn.Parameter, Tensor]:
        """Return a dict from each averaged weight to its average, empty if nothing is averaged."""
        return {
            parameter: shadow
            for name, average in self.averages.items()
            for parameter, shadow in zip(
                self.averaged(name).parameters(), average.shadow_params, strict=True
            )
        }

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put all learners in eval mode inside this context, with averaged weights if they exist.

        If `Learner.averaged` is only a part of a module, only this part is in eval mode.
        """
        with contextlib.ExitStack() as stack:
            for name, learner in self.task.learners.items():
                part = learner.module if learner.averaged is None else learner.averaged
                stack.enter_context(averaged_weights(part, self.averages.get(name)))
            yield


def build_training(
    task: Task, *, folder: Path, accelerator: Accelerator, resumed: bool = False
) -> Training:
    """Build the training of an opened task, initialised from the seed on every rank.

    Args:
        task: what to train, after its method `open` was called.
        folder: the run's folder.
        accelerator: knows the processes and the device.
        resumed: whether a checkpoint will overwrite the weights.
    """
    # modules and optimizers
    task.config = task.config.for_processes(accelerator.num_processes)
    options = task.config.optimizer
    seed_everything(Stream.WEIGHTS, task.config.run.seed)
    task.device = accelerator.device
    task.build(accelerator, resumed=resumed)

    # weight averages
    averages = {
        name: WeightAverage(
            list(learner.averaged.parameters()), decay=options.ema_decay, foreach=True
        )
        for name, learner in task.learners.items()
        if learner.averaged is not None and options.use_ema
    }
    return Training(task=task, folder=folder, accelerator=accelerator, averages=averages)
