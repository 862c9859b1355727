"""The options that every run has: its optimizer, its length, files and logs.

A task's options are a `JobConfig` with sections of their own.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, Tag, field_validator

from latentvae.option_marks import (
    Count,
    DecidesTheWatch,
    MayChange,
    Positive,
    Private,
    Section,
    marked,
)


class OptimizerConfig(Section):
    """AdamW, its schedule, clipping and the weight average."""

    learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-4,
        description="Peak learning rate, taken as it stands (not scaled by the batch).",
    )
    lr_scheduler: Literal["constant", "cosine"] = Field(
        default="constant",
        description="After the warm-up: constant, or a cosine to 0 at max_train_steps.",
    )
    lr_warmup_steps: Count = Field(default=1000, description="Updates of linear warm-up.")
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.9, description="AdamW's first beta."
    )
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.999, description="AdamW's second beta."
    )
    adam_weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="AdamW's weight decay."
    )
    adam_epsilon: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-8, description="AdamW's epsilon."
    )
    max_grad_norm: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0,
        description="Clip the gradient norm of the model and of the discriminator to this.",
    )
    max_skipped_updates: Positive = Field(
        default=10,
        description=(
            "Stop after this many non-finite updates in a row; up to it each is skipped "
            "and counted."
        ),
    )
    use_ema: bool = Field(
        default=True,
        description="Average the weights; the average is what is validated and exported.",
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.999, description="Decay of the average per update (reached by a warm-up)."
    )


class RunConfig(Section):
    """Length, batch, precision, files and logs of the run."""

    output_dir: Annotated[str | None, MayChange(), Private()] = Field(
        default=None, description="Folder of the run: checkpoints, log, samples, export."
    )
    max_train_steps: Annotated[Positive, MayChange()] = Field(
        default=100_000, description="Updates of the model."
    )
    train_batch_size: Positive = Field(default=12, description="Images per process and micro-step.")
    eval_batch_size: Annotated[Positive, MayChange()] = Field(
        default=8, description="Images per process in validation."
    )
    gradient_accumulation_steps: Positive = Field(default=1, description="Micro-steps per update.")
    # May change on resume, for the launcher may give it; it is compared apart.
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"] | None, MayChange()] = Field(
        default=None,
        description=(
            "bf16 autocast over float32 weights, or no; by default what `accelerate "
            "launch` was told. fp16 is refused."
        ),
    )
    seed: Count = Field(default=0, description="Seed of everything random.")
    resume_from_checkpoint: Annotated[str, MayChange(), Private()] = Field(
        default="latest", description="`latest`, or a checkpoint folder of this run."
    )
    overwrite_output_dir: Annotated[bool, MayChange(), Private()] = Field(
        default=False, description="Delete an earlier run in output_dir and start anew."
    )
    checkpointing_steps: Annotated[Positive, MayChange()] = Field(
        default=1000, description="Updates between checkpoints."
    )
    checkpoints_total_limit: Annotated[Positive, MayChange()] = Field(
        default=2, description="Checkpoints kept."
    )
    validation_steps: Annotated[Positive, MayChange(), DecidesTheWatch()] = Field(
        default=1000, description="Updates between validations (and after the last)."
    )
    log_steps: Annotated[Positive, MayChange(), DecidesTheWatch()] = Field(
        default=50, description="Updates between rows of log.jsonl."
    )
    report_to: Annotated[Literal["none", "tensorboard", "wandb"], MayChange(), Private()] = Field(
        default="none", description="Tracker beside log.jsonl, through Accelerate."
    )
    tracker_project_name: Annotated[str, MayChange(), Private()] = Field(
        default="latentvae", description="Project name given to the tracker."
    )
    push_to_hub: Annotated[bool, MayChange(), Private()] = Field(
        default=False,
        description=(
            "Upload the export to the Hugging Face Hub, as whom `hf auth login` or HF_TOKEN says."
        ),
    )
    hub_model_id: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description="Repository to upload to, owner/name; by default output_dir's name, your own.",
    )
    hub_private_repo: Annotated[bool, MayChange(), Private()] = Field(
        default=False, description="Make that repository private, if it is new."
    )
    ddp_timeout: Annotated[Positive, MayChange()] = Field(
        default=1800, description="Seconds after which a hanging rank ends the run."
    )

    @field_validator("output_dir")
    @classmethod
    def _from_home(cls, value: str | None) -> str | None:
        """The shell leaves the ~ of --output_dir=~/runs as it is."""
        return None if value is None else os.path.expanduser(value)


class JobConfig(Section):
    """The options of a run of any task: a section of them is `optimizer`, one is `run`.

    A task's class declares these fields itself, among its own sections, in the order of `--help`:

        class RegressionConfig(JobConfig):
            config: Annotated[str, MayChange()] = ""  # YAML file or preset they came from
            table: TableConfig = TableConfig()
            optimizer: OptimizerConfig = OptimizerConfig()
            run: RunConfig = RunConfig()
    """

    if TYPE_CHECKING:
        config: str = ""
        optimizer: OptimizerConfig = OptimizerConfig()
        run: Any = RunConfig()  # or a class that extends it

    def may_change(self, then: "JobConfig") -> frozenset[str]:
        """Names of options in which a resumed run may differ from how it was started.

        Args:
            then: the options that it was started with.
        """
        return frozenset(marked(type(self), MayChange))

    def with_changes(self, sections: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return a copy with other values of some options, by section and name; not validated."""
        changed = {
            name: getattr(self, name).model_copy(update=dict(values))
            for name, values in sections.items()
        }
        return self.model_copy(update=changed)


def kinds(schema: Any) -> dict[str, type[Section]]:
    """Classes of options that a preset chooses between, at any depth, by what chooses them."""
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
    """Leaf names of all options, whatever a preset chooses."""
    names: dict[str, None] = {}
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        for name, info in schema.model_fields.items():
            inner = option_names(info.annotation)
            names |= dict.fromkeys(inner or [name])
    for part in get_args(schema):
        names |= dict.fromkeys(option_names(part))
    return list(names)


def _annotations(schema: Any) -> list[Any]:
    """The schema itself or, of a section, those of its fields."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return [info.annotation for info in schema.model_fields.values()]
    return [schema]


def flat(config: BaseModel) -> dict[str, Any]:
    """Every option by its leaf name."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        values |= flat(value) if isinstance(value, BaseModel) else {name: value}
    return values
