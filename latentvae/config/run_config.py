"""Options that every training run has, such as the optimizer, the length, the files and the logs.

Each kind of training has its own subclass of `JobConfig`. The subclass adds sections (groups of
options), such as the options of the autoencoder.
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

# The default None is a placeholder. `JobConfig.for_processes` replaces None by a number before
# other code reads the option.
_FOLLOWS: Any = None
if TYPE_CHECKING:
    FollowsGlobalBatch = int
else:
    FollowsGlobalBatch = Annotated[int, Field(ge=1)] | None


class OptimizerConfig(Section):
    """Options of optimizer, learning rate, gradient clipping and moving average of the weights."""

    optimizer: Annotated[Literal["adamw", "muon"], Elsewhere("optim optimizer_type")] = Field(
        default="adamw",
        description=(
            "Optimizer of the model. `muon` uses Muon for the weights of convolutions and "
            "attention, and AdamW for all other parameters. The discriminator of a GAN loss always "
            "uses AdamW."
        ),
    )
    muon_learning_rate: Annotated[float, Field(gt=0.0), Elsewhere("muon_lr")] = Field(
        default=1e-3,
        description=(
            "Peak learning rate of the weights that Muon trains, if `optimizer` is `muon`. The "
            "peak learning rate of all other parameters is learning_rate."
        ),
    )
    learning_rate: Annotated[float, Field(gt=0.0), Elsewhere("lr base_lr max_lr")] = Field(
        default=1e-4,
        description=(
            "Peak learning rate of the model. The program does not change the learning rate if you "
            "change the batch size."
        ),
    )
    lr_scheduler: Annotated[
        Literal["constant", "cosine"], Elsewhere("lr_scheduler_type scheduler lr_schedule")
    ] = Field(
        default="constant",
        description=(
            "Schedule of the learning rate after the warm-up. `constant` keeps the peak learning "
            "rate. `cosine` lowers the learning rate along half a cosine, to 0 at the last update "
            "(max_train_steps)."
        ),
    )
    lr_warmup_steps: Annotated[
        UpdatesOrShare, Elsewhere("warmup_steps num_warmup_steps warmup")
    ] = Field(
        default=1000,
        description=(
            "Number of updates of the model over which the learning rate grows linearly to its "
            "peak. Updates in which only the discriminator learns are not counted. A value between "
            "0 and 1 is a fraction of the whole training (max_train_steps). 0 turns the warm-up "
            "off."
        ),
    )
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0), Elsewhere("beta1")] = Field(
        default=0.9,
        description="Beta 1 of AdamW: the decay per update of its moving average of gradients.",
    )
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0), Elsewhere("beta2")] = Field(
        default=0.999,
        description=(
            "Beta 2 of AdamW: the decay per update of its moving average of squared gradients."
        ),
    )
    adam_weight_decay: Annotated[float, Field(ge=0.0), Elsewhere("weight_decay wd")] = Field(
        default=0.0, description="Weight decay of AdamW and of Muon. 0 means no weight decay."
    )
    adam_epsilon: Annotated[float, Field(gt=0.0), Elsewhere("adam_eps eps epsilon")] = Field(
        default=1e-8,
        description="Epsilon of AdamW: a small number that prevents a division by zero.",
    )
    max_grad_norm: Annotated[
        float, Field(gt=0.0), Elsewhere("clip_grad_norm gradient_clip_val grad_clip clip_grad")
    ] = Field(
        default=1.0,
        description=(
            "Largest norm of a gradient. A gradient with a norm above max_grad_norm is scaled down "
            "to the norm max_grad_norm. The gradients of the model and of the discriminator are "
            "clipped separately."
        ),
    )
    skip_grad_norm: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description=(
            "Skip an update if the norm of a gradient, before clipping, is above this value. Set "
            "skip_grad_norm for hierarchical VAEs, because a single bad batch can destroy the "
            "weights of such a network. By default, an update is skipped only if a gradient is "
            "infinite or NaN."
        ),
    )
    max_skipped_updates: Positive = Field(
        default=10,
        description=(
            "Stop the training with an error after this many skipped updates in a row. An update "
            "is skipped if a gradient is infinite or NaN, or if its norm is above skip_grad_norm."
        ),
    )
    use_ema: bool = Field(
        default=True,
        description=(
            "Keep a moving average of the weights. Validation and the exported model use this "
            "average in place of the trained weights."
        ),
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.999,
        description=(
            "Decay per update of the moving average of the weights (see use_ema). A larger decay "
            "averages over more updates. In the first updates the decay is smaller, so that the "
            "average soon forgets the initial weights."
        ),
    )


class RunConfig(Section):
    """Options of the run: its length, batch size, precision, files and logs."""

    output_dir: Annotated[
        str | None, MayChange(), Private(), Elsewhere("out out_dir output outdir save_dir logdir")
    ] = Field(
        default=None,
        description=(
            "Folder for the files of the training: checkpoints, log, sample images and the "
            "exported model. Every training needs output_dir."
        ),
    )
    max_train_steps: Annotated[
        Positive,
        MayChange(),
        Elsewhere("steps max_steps num_steps train_steps iterations max_iterations updates"),
    ] = Field(
        default=100_000,
        description="Length of the training: number of updates (optimizer steps).",
    )
    global_batch_size: Positive | None = Field(
        default=None,
        description=(
            "Number of images per update, summed over all processes and micro-steps (forward and "
            "backward passes). If you set global_batch_size, train_batch_size is only an upper "
            "limit for one micro-step in one process. The program computes "
            "gradient_accumulation_steps from global_batch_size, unless you set both options. By "
            "default, an update has train_batch_size * gradient_accumulation_steps * (number of "
            "processes) images."
        ),
    )
    train_batch_size: Annotated[
        Positive, Elsewhere("batch_size bs batch per_device_train_batch_size")
    ] = Field(
        default=12,
        description=(
            "Number of images per process and micro-step (forward and backward pass). If "
            "global_batch_size is set, a micro-step may have fewer images than train_batch_size, "
            "but never more."
        ),
    )
    eval_batch_size: Annotated[Positive, MayChange()] = Field(
        default=8,
        description=(
            "Batch size in validation: number of images that each process puts through the "
            "network at once."
        ),
    )
    gradient_accumulation_steps: Annotated[
        FollowsGlobalBatch, Elsewhere("grad_accum accumulate_grad_batches grad_accum_steps")
    ] = Field(
        default=_FOLLOWS,
        description=(
            "Number of micro-steps (forward and backward passes) per update. The update uses the "
            "average of their gradients. By default, this number is computed from "
            "global_batch_size. If global_batch_size is not set, the default is 1."
        ),
    )
    # The launcher may set the precision, so this option may change on resume. The engine checks
    # separately that the precision itself is the same as before.
    mixed_precision: Annotated[Literal["auto", "no", "bf16", "fp16"] | None, MayChange()] = Field(
        default=None,
        description=(
            "Precision of training. `bf16` computes in bfloat16 autocast and keeps the weights in "
            "float32. `no` computes in float32. `auto` means `bf16` if the machine multiplies "
            "bfloat16 faster than float32, else `no`. If you resume a training with `auto`, it "
            "keeps the precision that it was started with. By default, the training uses the "
            "precision that you give to `accelerate launch`. `fp16` is not supported."
        ),
    )
    seed: Count = Field(default=0, description="Seed of all random numbers.")
    resume_from_checkpoint: Annotated[
        str, MayChange(), Private(), Elsewhere("resume ckpt checkpoint resume_from")
    ] = Field(
        default="latest",
        description=(
            "Checkpoint to resume from. Give `latest`, or the folder of a checkpoint in "
            "output_dir, such as checkpoint-4000. `latest` means the newest checkpoint that is not "
            "damaged. If output_dir has no undamaged checkpoint, `latest` starts the training at "
            "the beginning."
        ),
    )
    overwrite_output_dir: Annotated[bool, MayChange(), Private(), Elsewhere("overwrite")] = Field(
        default=False,
        description="Delete an earlier training that is in output_dir, and start again.",
    )
    checkpointing_steps: Annotated[
        Positive, MayChange(), Elsewhere("save_steps save_every save_interval checkpoint_every")
    ] = Field(default=1000, description="Number of updates from one checkpoint to the next.")
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
        description=(
            "Number of updates from one validation to the next. There is always a validation after "
            "the last update."
        ),
    )
    log_steps: Annotated[
        Positive, MayChange(), DecidesTheWatch(), Elsewhere("logging_steps log_every log_interval")
    ] = Field(
        default=50,
        description="Number of updates from one row of the log file log.jsonl to the next.",
    )
    report_to: Annotated[
        Literal["none", "tensorboard", "wandb"],
        MayChange(),
        Private(),
        Elsewhere("tracker log_with logger"),
    ] = Field(
        default="none",
        description=(
            "Experiment tracker that receives the log values through Accelerate. `none` uses no "
            "tracker. The file log.jsonl is always written."
        ),
    )
    tracker_project_name: Annotated[str, MayChange(), Private()] = Field(
        default="latentvae", description="Project name in the experiment tracker."
    )
    push_to_hub: Annotated[bool, MayChange(), Private()] = Field(
        default=False,
        description=(
            "Upload the exported model to the Hugging Face Hub. The upload uses the account that "
            "you logged in to with `hf auth login`, or the account of the token in the environment "
            "variable HF_TOKEN."
        ),
    )
    hub_model_id: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description=(
            "Name of the Hub repository for the exported model, as owner/name. By default, the "
            "repository is in your account and is named like the folder output_dir."
        ),
    )
    hub_private_repo: Annotated[bool, MayChange(), Private()] = Field(
        default=False,
        description="If the upload creates a new Hub repository, make this repository private.",
    )
    ddp_timeout: Annotated[Positive, MayChange()] = Field(
        default=1800,
        description=(
            "Longest time in seconds that processes wait for each other. If one process hangs for "
            "longer than ddp_timeout, the training ends with an error."
        ),
    )

    @model_validator(mode="after")
    def _one_micro_step(self) -> Self:
        if self.global_batch_size is None and self.gradient_accumulation_steps is None:
            self.gradient_accumulation_steps = 1
        return self

    @field_validator("output_dir")
    @classmethod
    def _from_home(cls, value: str | None) -> str | None:
        """Expand the ~ in --output_dir=~/runs, because the shell does not expand it."""
        return None if value is None else os.path.expanduser(value)


class JobConfig(Section):
    """Base class of the options of a run, with the sections `optimizer` and `run`.

    Each kind of training has a subclass of `JobConfig`. The subclass declares the fields of
    `JobConfig` and its own sections in the order in which `--help` shows them:

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
        """Replace each option that is a fraction of max_train_steps by a number of updates."""
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
        """Number that must divide the number of images of a micro-step in one process."""
        return 1

    def for_processes(self, processes: int) -> Self:
        """Return options whose batch size and micro-steps fit the given number of processes.

        Raises:
            UserError: the global batch size cannot be divided evenly among the processes and
                micro-steps.
        """
        batch = split_batch(self.run, processes, multiple=self.batch_multiple)
        changed = {
            "train_batch_size": batch.per_process,
            "gradient_accumulation_steps": batch.micro_steps,
        }
        return self.with_changes({"run": changed})

    def may_change(self, then: "JobConfig") -> frozenset[str]:
        """Return the names of the options that may change when a run is resumed.

        Args:
            then: the options that the run was started with.
        """
        return frozenset(marked(type(self), MayChange))

    def how_to_branch(self, then: "JobConfig", *, folder: str) -> str:
        """Return a sentence that says how a new run with these options can continue an earlier run.

        If a resume changes an option that must stay the same, the error message ends with the
        returned sentence. The sentence is empty if a new run cannot start from the earlier run.

        Args:
            then: the options of the earlier run.
            folder: the folder of the earlier run.
        """
        return ""

    def with_changes(self, sections: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return a copy of the options in which some values are replaced.

        The new values are not checked.

        Args:
            sections: for each section, the new values by the name of the option.
        """
        changed = {
            name: getattr(self, name).model_copy(update=dict(values))
            for name, values in sections.items()
        }
        return self.model_copy(update=changed)


def kinds(schema: Any) -> dict[str, type[Section]]:
    """Return the option classes that a preset can choose, by the pydantic tag of each class.

    Option classes in nested sections are included.
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
    """Return the names of all options, without their sections.

    If a preset can choose between option classes, the options of every class are included.
    """
    names: dict[str, None] = {}
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        for name, info in schema.model_fields.items():
            inner = option_names(info.annotation)
            names |= dict.fromkeys(inner or [name])
    for part in get_args(schema):
        names |= dict.fromkeys(option_names(part))
    return list(names)


def _annotations(schema: Any) -> list[Any]:
    """Return the types of a section's fields. If `schema` is no section, return `schema` itself."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return [info.annotation for info in schema.model_fields.values()]
    return [schema]


def flat(config: BaseModel) -> dict[str, Any]:
    """Return the value of every option by the name of the option, without its section."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        values |= flat(value) if isinstance(value, BaseModel) else {name: value}
    return values
