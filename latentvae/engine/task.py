"""The interface between the engine and a task. A task defines what a run trains.

    class Regression(Task): ...         # modules, batches, micro_step, validate, export

    export = train(Regression(config))  # engine.loop

The task owns its modules, objective, optimizers and controllers (which adapt values such as loss
weights). The engine owns the run's folder and lock, checkpoints and resume, log and trackers,
signals and schedules. The engine also clips gradients, skips updates with non-finite gradients,
averages weights and uploads exports. The engine does not depend on the kind of task.

The engine calls a task in this order (in brackets: only after a resume):

    check -> open -> check_processes -> build -> [load_tensors, load_state, load_rank_state]
    -> check_ready -> write_files -> batches -> plan -> begin
    each update: learning, micro_step ..., measured -> after_update (finite only) -> end_update
    now and then: row | tensors, state, rank_state | validate, save_samples, validated
    at the end: summary, export, done

Every log name of a task is "group/name". Names of validation metrics begin with "validation/".
"""

# ruff: noqa: B027  optional methods have an empty body here

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
from latentvae.engine.muon import MuonWithAdamW
from latentvae.engine.processes import prepare

Averages = Mapping[nn.Parameter, Tensor]


class State(BaseModel):
    """Base class for the plain values of a task in a checkpoint.

    Unknown or missing values are an error.
    """

    model_config = ConfigDict(strict=True, extra="forbid")


@dataclass(kw_only=True)
class Learner:
    """A module with the optimizer that trains it.

    Attributes:
        module: the bare module. A checkpoint holds the `state_dict` of this module.
        prepared: the same module wrapped in autocast and, with several processes, in DDP. Training
            calls this wrapped module.
        optimizer: trains the module's parameters.
        rate: peak learning rate. In every update, the engine sets the learning rate of each
            parameter group.
        averaged: the part of the module whose weights are averaged, validated and exported. With
            None, or without `use_ema`, the trained weights are validated and exported.
    """

    module: nn.Module
    prepared: nn.Module
    optimizer: optim.Optimizer
    rate: float
    averaged: nn.Module | None = None

    @classmethod
    def with_optimizer(
        cls,
        module: nn.Module,
        accelerator: Accelerator,
        options: OptimizerConfig,
        *,
        rate: float | None = None,
        averaged: nn.Module | None = None,
        matrices: Sequence[nn.Parameter] = (),
        some_wait: bool = False,
    ) -> "Learner":
        """Wrap a module for all processes, create its optimizer, and return both as a learner.

        The optimizer trains the parameters that require a gradient.

        Args:
            module: the bare module.
            accelerator: wraps the module.
            options: settings of the optimizer.
            rate: peak learning rate, by default the learning rate of the options.
            averaged: the part of the module whose weights are averaged.
            matrices: weights that Muon trains if the options choose Muon.
            some_wait: whether some parameters get no gradient in some updates, see
                `processes.prepare`.
        """
        rate = options.learning_rate if rate is None else rate
        adamw: dict[str, Any] = {
            "lr": rate,
            "betas": (options.adam_beta1, options.adam_beta2),
            "weight_decay": options.adam_weight_decay,
            "eps": options.adam_epsilon,
            "fused": True,
        }

        parameters = [p for p in module.parameters() if p.requires_grad]
        if matrices and options.optimizer == "muon":
            chosen = {id(weight) for weight in matrices}
            optimizer = MuonWithAdamW(
                [p for p in parameters if id(p) in chosen],
                [p for p in parameters if id(p) not in chosen],
                muon_lr=options.muon_learning_rate,
                **adamw,
            )
        else:
            optimizer = optim.AdamW(parameters, **adamw)

        return cls(
            module=module,
            prepared=prepare(accelerator, module, some_wait=some_wait),
            optimizer=optimizer,
            rate=rate,
            averaged=averaged,
        )


class Task(ABC):
    """Base class of what a run trains: modules, data and objective.

    A subclass defines the abstract methods, `config_class` and `launch`.

    Attributes:
        config: the options. The engine replaces this object by completed options, and `open` is
            allowed to do so too.
        learners: modules with their optimizers (see `Learner`) by name, created by `build`. The
            names of checkpoint files and log values contain the name of the learner.
        device: the device of modules and batches. The engine sets it before `build`.
        say: prints a line above the progress bar, on the first rank only. The engine sets `say`
            just before it calls `begin`. Until then, `say` is `print`.
        steps_per_epoch: number of micro-steps in an epoch, in which every item is used once. None
            means unknown.
    """

    config_class: ClassVar[type[JobConfig]]  # schema of `config.yaml`
    state_class: ClassVar[type[State]] = State
    rank_state_class: ClassVar[type[State]] = State

    title: ClassVar[str] = "Model"  # begins the message of an upload
    unit: ClassVar[str] = "items"  # the name of a batch's items in the log
    shown: ClassVar[Sequence[str]] = ()  # log names on the progress line
    files: ClassVar[Sequence[str]] = ()  # names of files that `write_files` may write
    parts: ClassVar[Mapping[str, str]] = {}  # prefix of weights to compare separately, by name

    # The advice if all cores already read data.
    data_advice: ClassVar[str] = "make the data faster to read"
    non_finite_advice: ClassVar[str] = ""  # More remedies, such as ", or a later disc_start".

    launch: ClassVar[Sequence[str]]  # arguments of `accelerate launch` before --config

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
        """Check the options without touching a file.

        Raises:
            UserError: an option is wrong. The message names the option, its value and what is
                allowed.
        """

    def open(self) -> None:
        """Open the data and everything else that the options name, without writing a file.

        Raises:
            UserError: something is missing or cannot be used.
        """

    def check_processes(self, processes: int) -> None:
        """Raise UserError if the task cannot run with this number of processes."""

    @abstractmethod
    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        """Build modules and `learners`, the same on every rank.

        The engine has already seeded the global random generators.

        Args:
            accelerator: wraps the modules.
            resumed: whether a checkpoint will overwrite the weights.
        """

    @abstractmethod
    def batches(self, *, start_step: int) -> Iterable[Any]:
        """Return endless batches of this rank, starting at a micro-step.

        The batches depend only on the seed, the step and the rank. The method sets
        `steps_per_epoch` before it returns. Batches may be on the CPU: `micro_step` moves them to
        `device`.
        """

    def check_ready(self) -> None:
        """Make the last checks before the engine prepares the run's folder.

        Raises:
            UserError: a fault would later end the run, such as images that cannot be read.
        """

    def write_files(self, folder: Path) -> None:
        """Write the files named in `files` into the run's folder, on the first rank only."""

    def identity(self) -> dict[str, Any]:
        """Return JSON values that must be the same after a resume, such as the number of items."""
        return {}

    @property
    def num_workers(self) -> int:
        """Number of processes of this rank that read the data."""
        return 0

    @property
    def items_read(self) -> int:
        """Number of items that a process reads for one micro-step."""
        return self.config.run.train_batch_size

    def plan(self) -> dict[str, str]:
        """Return rows of the printed plan, keyed by heading: what is trained, and on which data."""
        return {}

    def warnings(self) -> list[str]:
        """Return a warning for each option that has less effect than a user may expect."""
        return []

    def step_size(self) -> str:
        """Return text that names the options that decide how much memory a micro-step needs.

        The error about too little memory shows this text.
        """
        return f"train_batch_size {self.config.run.train_batch_size}"

    def memory_advice(self) -> list[str]:
        """Return settings of options that need less memory, in the order in which to try them."""
        options, advice = self.config.run, []
        if options.train_batch_size > 1:
            multiple = self.config.batch_multiple
            half = max(options.train_batch_size // 2 // multiple, 1) * multiple
            steps = f" --gradient_accumulation_steps {options.gradient_accumulation_steps * 2}"
            follows = options.global_batch_size is not None
            advice.append(
                f"--train_batch_size {half}{'' if follows else steps} "
                f"(as many {self.unit} per update)"
            )
        if options.mixed_precision != "bf16":
            advice.append("--mixed_precision bf16")
        return advice

    # an update

    def begin(self, update: int) -> None:
        """Prepare for the first update after a start or a resume.

        `update` is the number of updates done, which is 0 for a new run.
        """

    def learning(self, update: int) -> Sequence[str]:
        """Return the names (at least one) of the modules that learn in update `update` (from 0)."""
        return tuple(self.learners)

    def pause(self, name: str) -> range:
        """Return the range of updates, counted from 0, in which the module `name` does not learn.

        The warm-up of the learning rate does not count these updates.
        """
        return range(0)

    @abstractmethod
    def micro_step(self, batch: Any, update: int) -> dict[str, Tensor]:
        """Compute the gradients of one batch and add them to the gradients of the update.

        Divide the loss by `config.run.gradient_accumulation_steps`, because gradients are summed.

        Returns:
            Values to log: scalars on the device by log name.
        """

    def keys(self, batch: Any) -> Any:
        """Return small values from which `names` can later compute the names of a batch's items."""
        return None

    def names(self, keys: Any) -> list[str]:
        """Return the names of a batch's items, given the result of `keys`, for an error message."""
        return []

    def measured(self, values: Sequence[Mapping[str, Tensor]], update: int) -> Tensor:
        """Return the values whose means over ranks `after_update` needs, as a tensor (n,).

        The values are on `device`. The engine averages them over ranks in the update's only host
        synchronisation.

        Args:
            values: logged values of each micro-step of this rank.
            update: number of the update, from 0.
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
        """Adapt values such as loss weights after an update that was not skipped.

        The optimizers have already updated the weights.

        Args:
            update: number of the update, from 0.
            values: logged values of the update's micro-steps.
            means: the values of `measured`, averaged over all ranks.
            averages: the average of each averaged weight. The task may change averages in place.

        Returns:
            More values to log.
        """
        return {}

    def end_update(self) -> None:
        """Discard the values collected for this update, also if the update was skipped."""

    # between updates

    def row(self, update: int, means: Mapping[str, float]) -> dict[str, float]:
        """Return more values for the next row of the log. All ranks call this method.

        Args:
            update: number of updates done.
            means: means over ranks of the values logged since the last row.
        """
        return {}

    def validate(self, update: int) -> dict[str, float]:
        """Measure the averaged weights in eval mode on all ranks.

        The engine leaves gradients enabled.

        Returns:
            Metrics by log name, the same on every rank. Names start with `validation/`. The result
            is empty when there is nothing to measure.
        """
        return {}

    def save_samples(self, path: Path) -> bool:
        """Draw a picture on the first rank. Return whether a picture was drawn."""
        return False

    def validation_line(self, values: Mapping[str, float]) -> str:
        """Return the line that is printed after a validation."""
        shown = (f"{name.rpartition('/')[2]} {value:.4g}" for name, value in values.items())
        return ", ".join(shown)

    def validated(self, update: int, values: Mapping[str, float]) -> None:
        """Process the results of a validation: a new one or, after a resume, the one in the log."""

    def summary(self) -> str | None:
        """Return the text to print when the run ends or stops, if any."""
        return None

    # checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return a checkpoint's tensors that belong to no module in `learners`, by file and name.

        The method returns the tensors in use, not copies. A file's name must not be a learner's
        name, nor a learner's name followed by `_optimizer` or `_average`.
        """
        return {}

    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load tensors that `tensors` returned. Names and shapes are already checked."""

    def state(self) -> State:
        """Return plain values for a checkpoint, the same on every rank. All ranks call `state`."""
        return self.state_class()

    def load_state(self, state: Any, *, update: int) -> None:
        """Load values that `state` returned.

        Raises:
            UserError: the values were not written by a run of this task.
        """

    def rank_state(self) -> State:
        """Return this rank's own plain values for a checkpoint."""
        return self.rank_state_class()

    def load_rank_state(self, state: Any) -> None:
        """Load values that `rank_state` returned."""

    # the end

    @abstractmethod
    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        """Export the averaged weights. All ranks call this method, and the first rank writes.

        Args:
            out: the export's folder. An existing folder is replaced.
            update: number of updates done.
            folder: the run's folder.

        Returns:
            Values to log on the first rank, by names that start with `export/`.
        """

    def export_options(self) -> dict[str, Any]:
        """Return the options that change the content of an export, by log name."""
        return {}

    def has_export(self, out: Path) -> bool:
        """Return whether `out` holds a complete export."""
        return out.is_dir()

    def done(self, out: Path) -> str:
        """Return the last line that a finished run prints."""
        return f"done: {out}"

    # proofs

    @classmethod
    def shortened(cls, config: Any, *, updates: int) -> Any:
        """Return the options of a short run, whose training phases all start within its `updates`.

        The command `verify-resume` makes such short runs.
        """
        return config

    def check_repeatable(self) -> None:
        """Raise UserError if a resumed run would differ from an uninterrupted one.

        Call `open` first.
        """

    def order(self, *, rank: int, processes: int, start: int, stop: int) -> list[Any] | None:
        """Return the items that a rank reads in micro-steps `start` to `stop` - 1, None if unknown.

        Call `open` first.
        """
        return None
