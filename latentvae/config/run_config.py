"""The options that every run has: its optimizer, length, files and logs.

The options of a task are a `JobConfig` with more sections.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, Tag, field_validator, model_validator

from latentvae.config.update_batch import split_batch
from latentvae.option_marks import (
    Count,
    DecidesTheWatch,
    Elsewhere,
    MayChange,
    Positive,
    Private,
    Section,
    ShareOfRun,
    UpdatesOrShare,
    marked,
)

# None becomes a number in `JobConfig.for_processes`, before anything computes with it.
_FOLLOWS: Any = None
if TYPE_CHECKING:
    FollowsGlobalBatch = int
else:
    FollowsGlobalBatch = Annotated[int, Field(ge=1)] | None


class OptimizerConfig(Section):
    """AdamW, the learning rate's schedule, gradient clipping and the average of the weights."""

    learning_rate: Annotated[float, Field(gt=0.0), Elsewhere("lr base_lr max_lr")] = Field(
        default=1e-4,
        description="Peak learning rate. The learning rate is not scaled by the batch size.",
    )
    lr_scheduler: Annotated[
        Literal["constant", "cosine"], Elsewhere("lr_scheduler_type scheduler lr_schedule")
    ] = Field(
        default="constant",
        description=(
            "Learning rate after the warm-up: constant, or cosine decay to 0 at max_train_steps."
        ),
    )
    lr_warmup_steps: Annotated[
        UpdatesOrShare, Elsewhere("warmup_steps num_warmup_steps warmup")
    ] = Field(
        default=1000,
        description=(
            "Number of updates over which the learning rate grows linearly, counted from the "
            "model's first update. A value below 1 is a share of max_train_steps."
        ),
    )
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0), Elsewhere("beta1")] = Field(
        default=0.9, description="AdamW's first beta."
    )
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0), Elsewhere("beta2")] = Field(
        default=0.999, description="AdamW's second beta."
    )
    adam_weight_decay: Annotated[float, Field(ge=0.0), Elsewhere("weight_decay wd")] = Field(
        default=0.0, description="AdamW's weight decay."
    )
    adam_epsilon: Annotated[float, Field(gt=0.0), Elsewhere("adam_eps eps epsilon")] = Field(
        default=1e-8, description="AdamW's epsilon."
    )
    max_grad_norm: Annotated[
        float, Field(gt=0.0), Elsewhere("clip_grad_norm gradient_clip_val grad_clip clip_grad")
    ] = Field(
        default=1.0,
        description=(
            "Largest gradient norm. The gradients of the model and of the discriminator are "
            "clipped to it separately."
        ),
    )
    max_skipped_updates: Positive = Field(
        default=10,
        description=(
            "Stop after this many updates in a row whose loss or gradient is not finite. Fewer "
            "such updates are skipped and counted."
        ),
    )
    use_ema: bool = Field(
        default=True,
        description="Keep a moving average of the weights. The average is validated and exported.",
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.999,
        description=(
            "Decay per update of the average of the weights. The decay starts lower and rises to "
            "this value."
        ),
    )


class RunConfig(Section):
    """Length, batch, precision, files and logs of the run."""

    output_dir: Annotated[
        str | None, MayChange(), Private(), Elsewhere("out out_dir output outdir save_dir logdir")
    ] = Field(
        default=None,
        description="Output folder of the run, for checkpoints, log, sample images and export.",
    )
    max_train_steps: Annotated[
        Positive,
        MayChange(),
        Elsewhere("steps max_steps num_steps train_steps iterations max_iterations updates"),
    ] = Field(default=100_000, description="Number of updates of the model.")
    global_batch_size: Positive | None = Field(
        default=None,
        description=(
            "Number of images per update over all processes and micro-steps. With this option, "
            "train_batch_size is the most that a process takes at once, and "
            "gradient_accumulation_steps is computed."
        ),
    )
    train_batch_size: Annotated[
        Positive, Elsewhere("batch_size bs batch per_device_train_batch_size")
    ] = Field(
        default=12,
        description=(
            "Images per process and micro-step. With global_batch_size, this is the maximum."
        ),
    )
    eval_batch_size: Annotated[Positive, MayChange()] = Field(
        default=8, description="Batch size of each process in validation."
    )
    gradient_accumulation_steps: Annotated[
        FollowsGlobalBatch, Elsewhere("grad_accum accumulate_grad_batches grad_accum_steps")
    ] = Field(
        default=_FOLLOWS,
        description=(
            "Number of micro-steps per update, whose gradients are averaged. The default is "
            "computed from global_batch_size, or is 1 without global_batch_size."
        ),
    )
    # The precision may change on resume, because the launcher may set it. The engine compares it
    # separately.
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"] | None, MayChange()] = Field(
        default=None,
        description=(
            "Precision of training. bf16: autocast over float32 weights. no: float32. Default: the "
            "precision given to `accelerate launch`. fp16 is an error."
        ),
    )
    seed: Count = Field(default=0, description="Seed of all random numbers.")
    resume_from_checkpoint: Annotated[
        str, MayChange(), Private(), Elsewhere("resume ckpt checkpoint resume_from")
    ] = Field(
        default="latest",
        description="Checkpoint to resume from: `latest`, or a checkpoint folder of this run.",
    )
    overwrite_output_dir: Annotated[bool, MayChange(), Private(), Elsewhere("overwrite")] = Field(
        default=False, description="Delete an earlier run in output_dir and start again."
    )
    checkpointing_steps: Annotated[
        Positive, MayChange(), Elsewhere("save_steps save_every save_interval checkpoint_every")
    ] = Field(default=1000, description="Number of updates between checkpoints.")
    checkpoints_total_limit: Annotated[
        Positive, MayChange(), Elsewhere("save_total_limit save_top_k")
    ] = Field(
        default=2, description="Number of checkpoints to keep. Older checkpoints are deleted."
    )
    validation_steps: Annotated[
        Positive,
        MayChange(),
        DecidesTheWatch(),
        Elsewhere("eval_steps eval_every val_check_interval"),
    ] = Field(
        default=1000,
        description="Number of updates between validations. The last update is always validated.",
    )
    log_steps: Annotated[
        Positive, MayChange(), DecidesTheWatch(), Elsewhere("logging_steps log_every log_interval")
    ] = Field(default=50, description="Number of updates between rows of log.jsonl.")
    report_to: Annotated[
        Literal["none", "tensorboard", "wandb"],
        MayChange(),
        Private(),
        Elsewhere("tracker log_with logger"),
    ] = Field(
        default="none",
        description=(
            "Tracker that also gets the logs, through Accelerate. log.jsonl is always written."
        ),
    )
    tracker_project_name: Annotated[str, MayChange(), Private()] = Field(
        default="latentvae", description="Project name given to the tracker."
    )
    push_to_hub: Annotated[bool, MayChange(), Private()] = Field(
        default=False,
        description=(
            "Upload the export to the Hugging Face Hub, with the account of `hf auth login` or of "
            "the token in HF_TOKEN."
        ),
    )
    hub_model_id: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description=(
            "Hub repository to upload the export to, as owner/name. Default: the name of "
            "output_dir in your account."
        ),
    )
    hub_private_repo: Annotated[bool, MayChange(), Private()] = Field(
        default=False,
        description="Make the Hub repository of the export private if the repository is new.",
    )
    ddp_timeout: Annotated[Positive, MayChange()] = Field(
        default=1800, description="Number of seconds after which a process that hangs ends the run."
    )

    @model_validator(mode="after")
    def _one_micro_step(self) -> Self:
        if self.global_batch_size is None and self.gradient_accumulation_steps is None:
            self.gradient_accumulation_steps = 1
        return self

    @field_validator("output_dir")
    @classmethod
    def _from_home(cls, value: str | None) -> str | None:
        """Expand the ~ of --output_dir=~/runs, which the shell does not."""
        return None if value is None else os.path.expanduser(value)


class JobConfig(Section):
    """Options of a run of any task, with the sections `optimizer` and `run`.

    The class of a task declares these fields and its own sections, in the order of `--help`:

        class RegressionConfig(JobConfig):
            config: Annotated[str, MayChange()] = ""  # YAML file or preset of these options
            table: TableConfig = TableConfig()
            optimizer: OptimizerConfig = OptimizerConfig()
            run: RunConfig = RunConfig()
    """

    if TYPE_CHECKING:
        config: str = ""
        optimizer: OptimizerConfig = OptimizerConfig()
        run: Any = RunConfig()  # or a subclass

    @model_validator(mode="after")
    def _shares_to_updates(self) -> Self:
        """Replace shares of the run by numbers of updates."""
        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, BaseModel):
                shares = {n: getattr(section, n) for n in marked(type(section), ShareOfRun)}
                updates = {
                    n: round(value * self.run.max_train_steps)
                    for n, value in shares.items()
                    if 0 < value < 1
                }
                setattr(self, name, section.model_copy(update=updates))
        return self

    @property
    def batch_multiple(self) -> int:
        """The batch of a process and micro-step must be a multiple of this number."""
        return 1

    def for_processes(self, processes: int) -> Self:
        """Return the options with batch and micro-steps set for this number of processes.

        Raises:
            UserError: the global batch cannot be divided as the options require.
        """
        batch = split_batch(self.run, processes, multiple=self.batch_multiple)
        changed = {
            "train_batch_size": batch.per_process,
            "gradient_accumulation_steps": batch.micro_steps,
        }
        return self.with_changes({"run": changed})

    def may_change(self, then: "JobConfig") -> frozenset[str]:
        """Return the names of the options that may have other values on resume.

        Args:
            then: the options that the run was started with.
        """
        return frozenset(marked(type(self), MayChange))

    def how_to_branch(self, then: "JobConfig", *, folder: str) -> str:
        """Return how a new run with these options can start from the result of an earlier one.

        The result is a sentence for the error about options that a resumed run cannot change. The
        result is empty if no such run is possible.

        Args:
            then: the options of the earlier run.
        """
        return ""

    def with_changes(self, sections: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return a copy with other values of some options, by section and name.

        The values are not checked.
        """
        changed = {
            name: getattr(self, name).model_copy(update=dict(values))
            for name, values in sections.items()
        }
        return self.model_copy(update=changed)


def kinds(schema: Any) -> dict[str, type[Section]]:
    """Return the classes of options that a preset chooses from, by the tag that chooses them.

    Classes in nested sections are included.
    """
    found: dict[str, type[Section]] = {}
    for annotation in _annotations(schema):
        tags = [
            data.tag for data in getattr(annotation, "__metadata__", ()) if isinstance(data, Tag)
        ]
        for part in get_args(annotation):
            found |= kinds(part)
        if tags:
            found |= {tags[0]: get_args(annotation)[0]}
    return found


def option_names(schema: Any) -> list[str]:
    """Return the leaf names of all options of every class that a preset can choose."""
    names: dict[str, None] = {}
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        for name, info in schema.model_fields.items():
            inner = option_names(info.annotation)
            names |= dict.fromkeys(inner or [name])
    for part in get_args(schema):
        names |= dict.fromkeys(option_names(part))
    return list(names)


def _annotations(schema: Any) -> list[Any]:
    """Return the types of a section's fields. For any other type, return the type."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return [info.annotation for info in schema.model_fields.values()]
    return [schema]


def flat(config: BaseModel) -> dict[str, Any]:
    """Return the value of every option by its leaf name."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        values |= flat(value) if isinstance(value, BaseModel) else {name: value}
    return values
