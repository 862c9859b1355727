"""The contract of a task: what a run trains.

    class Regression(Task): ...         # modules, batches, micro_step, validate, export

    export = train(Regression(config))  # engine.loop

The task owns its modules, objective, optimizers and controllers. The engine owns all else: the
run's folder and its lock, checkpoints and resume, the log and trackers, signals, schedules,
clipping, the guard against non-finite gradients, weight averages, uploads. It never asks which task
it has.

In the order of a run:

    check -> open -> check_processes -> build -> [load_tensors, load_state, load_rank_state]
    -> check_ready -> write_files -> batches -> plan -> begin
    each update: learning, micro_step ..., measured -> after_update (finite only) -> end_update
    now and then: row; tensors, state, rank_state; validate, save_samples, validated
    at the end: summary, export, done

Every log name is "group/name". Names of validation begin with "validation/".
"""

# ruff: noqa: B027  what a task need not write is empty here

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn, optim

from latentvae.config.run_config import JobConfig, OptimizerConfig
from latentvae.engine.processes import prepare

Averages = Mapping[nn.Parameter, Tensor]


class State(BaseModel):
    """Plain values of a task in a checkpoint; a checkpoint with others is refused."""

    model_config = ConfigDict(strict=True, extra="forbid")


@dataclass(kw_only=True)
class Learner:
    """A module that one optimizer trains.

    Attributes:
        module: its `state_dict` is what a checkpoint holds.
        prepared: the same module as DDP and autocast wrap it; this is what training calls.
        optimizer: of the module's parameters.
        rate: peak learning rate; the engine sets one rate for all parameter groups, every update.
        averaged: the part whose weights are averaged, validated and exported. None averages
            nothing: the weights themselves are validated and exported.
    """

    module: nn.Module
    prepared: nn.Module
    optimizer: optim.Optimizer
    rate: float
    averaged: nn.Module | None = None

    @classmethod
    def with_adamw(
        cls,
        module: nn.Module,
        accelerator: Accelerator,
        options: OptimizerConfig,
        *,
        rate: float | None = None,
        averaged: nn.Module | None = None,
    ) -> "Learner":
        """Prepare a module for all processes, with AdamW over what requires a gradient."""
        rate = options.learning_rate if rate is None else rate
        optimizer = optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
            fused=True,
        )
        return cls(
            module=module,
            prepared=prepare(accelerator, module),
            optimizer=optimizer,
            rate=rate,
            averaged=averaged,
        )


class Task(ABC):
    """What a run trains. Write the abstract methods, `config_class` and `launch`.

    Attributes:
        config: the options; `open` may replace it.
        learners: filled by `build`: modules by the name that their files and log values have.
        device: where modules and batches belong; set before `build`.
        say: prints a line above the progress bar, from `begin` on, on the first rank only.
        steps_per_epoch: micro-steps in which every item comes once; None: not known.
    """

    config_class: ClassVar[type[JobConfig]]  # what `config.yaml` is read with
    state_class: ClassVar[type[State]] = State
    rank_state_class: ClassVar[type[State]] = State

    title: ClassVar[str] = "Model"  # what an upload is called
    unit: ClassVar[str] = "items"  # what a batch is made of, in the log
    shown: ClassVar[Sequence[str]] = ()  # log names on the progress line
    files: ClassVar[Sequence[str]] = ()  # that `write_files` may write into the run's folder
    parts: ClassVar[Mapping[str, str]] = {}  # name -> prefix of weights compared by themselves

    data_advice: ClassVar[str] = "make the data faster to read"  # with all cores reading already
    non_finite_advice: ClassVar[str] = ""  # what else to try, after ", or " and the like

    launch: ClassVar[Sequence[str]]  # what `accelerate launch` starts, before --config

    config: Any
    learners: dict[str, Learner]
    device: torch.device
    say: Callable[[str], None]
    steps_per_epoch: int | None = None

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.learners = {}
        self.say = print

    # before the run

    def check(self) -> None:
        """Refuse wrong options without touching a file.

        Raises:
            UserError: names the option, its value and what is allowed.
        """

    def open(self) -> None:
        """Open the data, and whatever the options depend on. Nothing is written.

        Raises:
            UserError: it is not there or cannot be used.
        """

    def check_processes(self, processes: int) -> None:
        """Refuse a number of processes, as when there is not one batch for each of them."""

    @abstractmethod
    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        """Build modules and `learners`, the same on every rank; the generators are seeded.

        Args:
            resumed: a checkpoint will overwrite the weights.
        """

    @abstractmethod
    def batches(self, *, start_step: int) -> Iterable[Any]:
        """Endless batches of this rank from a micro-step on: a function of seed, step and rank.

        Sets `steps_per_epoch` before it returns. Batches may be on the CPU: `micro_step` moves them
        to `device`.
        """

    def check_ready(self) -> None:
        """Refuse what would end the run later; the last moment before the folder is taken."""

    def write_files(self, folder: Path) -> None:
        """Write files of its own into the run's folder, named in `files`; on the first rank."""

    def identity(self) -> dict[str, Any]:
        """Facts that must not change under a run, such as the number of items, as JSON values."""
        return {}

    @property
    def num_workers(self) -> int:
        """Processes of this rank that read the data."""
        return 0

    @property
    def items_read(self) -> int:
        """Items that a process reads for a micro-step."""
        return self.config.run.train_batch_size

    def plan(self) -> dict[str, str]:
        """Rows that tell what is trained on what, by heading; said before the first update."""
        return {}

    def step_size(self) -> str:
        """What decides the memory of a micro-step, for the error when it runs out."""
        return f"train_batch_size {self.config.run.train_batch_size}"

    def memory_advice(self) -> list[str]:
        """Options that need less memory, in the order to try."""
        options, advice = self.config.run, []
        if options.train_batch_size > 1:
            half = (options.train_batch_size + 1) // 2
            advice.append(
                f"--train_batch_size {half} --gradient_accumulation_steps "
                f"{options.gradient_accumulation_steps * 2} (as many {self.unit} per update)"
            )
        if options.mixed_precision != "bf16":
            advice.append("--mixed_precision bf16")
        return advice

    # an update

    def begin(self, update: int) -> None:
        """Called once before the first update of this process; `update` of them are done."""

    def learning(self, update: int) -> Sequence[str]:
        """Names of the learners that take part in an update (from 0); one at least."""
        return tuple(self.learners)

    @abstractmethod
    def micro_step(self, batch: Any, update: int) -> dict[str, Tensor]:
        """Add the gradients of one batch.

        Divide the loss by `config.run.gradient_accumulation_steps`, for gradients are added up.

        Returns:
            What to log, scalars on the device by log name.
        """

    def keys(self, batch: Any) -> Any:
        """What `names` needs to name the items of a batch later; small."""
        return None

    def names(self, keys: Any) -> list[str]:
        """Names of the items of a batch, for a message."""
        return []

    def measured(self, values: Sequence[Mapping[str, Tensor]], update: int) -> Tensor:
        """What the controllers need as a mean over ranks, (n,) on `device`, reduced in the update's
        one sync.

        Args:
            values: what the micro-steps of this rank logged.
        """
        return Tensor()

    def after_update(
        self,
        update: int,
        *,
        values: Sequence[Mapping[str, Tensor]],
        means: Sequence[float],
        averages: Averages,
    ) -> dict[str, Tensor]:
        """Move controllers, after the optimizers of an update whose gradients were finite.

        Args:
            update: from 0.
            values: what its micro-steps logged.
            means: `measured`, over all ranks.
            averages: the average of each averaged weight; may be changed in place.

        Returns:
            What else to log.
        """
        return {}

    def end_update(self) -> None:
        """Forget what was gathered for an update, finite or not."""

    # between updates

    def row(self, update: int, means: Mapping[str, float]) -> dict[str, float]:
        """What else stands in a row of the log, which is about to be written. All ranks call it.

        Args:
            update: updates done.
            means: of the logged values since the last row, over ranks.
        """
        return {}

    def validate(self, update: int) -> dict[str, float]:
        """Measure with the averaged weights, in eval mode, on all ranks; gradients are on.

        Returns:
            The same on every rank, by log names that start with `validation/`; empty for none.
        """
        return {}

    def save_samples(self, path: Path) -> bool:
        """Draw a picture, on the first rank; returns whether there is one."""
        return False

    def validation_line(self, values: Mapping[str, float]) -> str:
        """What is said of a validation."""
        shown = (f"{name.rpartition('/')[2]} {value:.4g}" for name, value in values.items())
        return ", ".join(shown)

    def validated(self, update: int, values: Mapping[str, float]) -> None:
        """Called after a validation is logged, and at a resume with the one that is in the log."""

    def summary(self) -> str | None:
        """What to say when the run ends or stops."""
        return None

    # checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors beside the learners' in a checkpoint, by file and name; as they are in use.

        No file may have the name of a learner, or that with `_optimizer` or `_average`.
        """
        return {}

    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The reverse of `tensors`; names and shapes are checked already."""

    def state(self) -> State:
        """Plain values of a checkpoint, the same on every rank. All ranks call it."""
        return self.state_class()

    def load_state(self, state: Any, *, update: int) -> None:
        """The reverse of `state`; a `UserError` for what no such run has written."""

    def rank_state(self) -> State:
        """Plain values of this rank."""
        return self.rank_state_class()

    def load_rank_state(self, state: Any) -> None:
        """The reverse of `rank_state`."""

    # the end

    @abstractmethod
    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        """Write the export with the averaged weights. All ranks call it, the first one writes.

        Args:
            out: folder, which is replaced if it is there.
            update: updates done.
            folder: of the run.

        Returns:
            What to log of it on the first rank, by names that start with `export/`.
        """

    def export_options(self) -> dict[str, Any]:
        """Options that change an export of the same weights, by log name."""
        return {}

    def has_export(self, out: Path) -> bool:
        """Whether a whole export lies there."""
        return out.is_dir()

    def done(self, out: Path) -> str:
        """The last line of a finished run."""
        return f"done: {out}"

    # proofs

    @classmethod
    def shortened(cls, config: Any, *, updates: int) -> Any:
        """The same run in a few updates with all that can go wrong in it, for `verify-resume`."""
        return config

    def check_repeatable(self) -> None:
        """Refuse, after `open`, what is not exact when resumed."""

    def order(self, *, rank: int, processes: int, start: int, stop: int) -> list[Any] | None:
        """The items of micro-steps `start` to `stop` of a rank, after `open`; None: not known."""
        return None
