"""The one schema of a training run: sections of options with ranges, checked before any work.

A YAML preset is loaded into it and flags override; see `latentvae.cli.train`. Leaf
names are unique over the sections, so every option is one flat flag, named as Hugging Face's
training scripts name it.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from latentvae.bottlenecks.table import QUANTIZERS
from latentvae.data.buckets import bucket_sizes
from latentvae.data.config import DataConfig
from latentvae.losses.discriminator_config import CriticConfig
from latentvae.losses.objective_config import KLTarget, NeedsKL, ObjectiveConfig
from latentvae.models.config import MODELS, AnyModelConfig, KLModelConfig, VQModelConfig
from latentvae.options import (
    Count,
    DecidesTheWatch,
    MayChange,
    Positive,
    Private,
    Section,
    marked,
)

BUCKET_MULTIPLE = 8  # pixels; divides the sides of buckets, whatever f is


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
        default=1.0, description="Clip the gradient norm of the model and of the critic to this."
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
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time.",
    )
    channels_last: bool = Field(
        default=False,
        description=(
            "Keep images and weights with the channels innermost: faster convolutions on GPUs with "
            "bf16; on CPUs slower backward passes."
        ),
    )
    torch_compile: bool = Field(
        default=False,
        description=(
            "Compile the network's blocks with torch.compile, which needs a C++ compiler or a GPU "
            "with Triton and takes minutes at the start."
        ),
    )
    # May change on resume: a matter of rounding, and older runs are without it.
    winograd: Annotated[bool, MayChange()] = Field(
        default=True,
        description=(
            "On CPUs in float32, compute 3 x 3 convolutions and their gradients with fewer "
            "multiplications, rounded to some 4e-6 of their size. Elsewhere without effect."
        ),
    )
    # May change on resume, for the launcher may give it; it is compared apart.
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"] | None, MayChange()] = Field(
        default=None,
        description=(
            "bf16 autocast over float32 weights, or no; by default what `accelerate "
            "launch` was told. fp16 is refused."
        ),
    )
    seed: Count = Field(default=0, description="Seed of everything random.")
    deterministic_posterior: bool = Field(
        default=False, description="Decode the posterior's mode in training instead of a sample."
    )
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
    num_sample_images: Annotated[Positive, MayChange()] = Field(
        default=6, description="Validation images shown in each sample grid."
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
    export_profile: Annotated[Literal["sd", "sdxl", "sd3"], MayChange()] = Field(
        default="sd",
        description=(
            "Which pipelines the export's scaling and shift are written for; sd serves "
            "all, sd3 (also FLUX) measures a shift, sdxl writes per-channel statistics."
        ),
    )
    lookup_from_codebook: Annotated[bool, MayChange()] = Field(
        default=False,
        description=(
            "Export a VQModel for aMUSEd: codes looked up by index, pixels in [0, 1]; without it "
            "for all other pipelines."
        ),
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


class TrainConfig(Section):
    """A whole training run."""

    config: Annotated[str, MayChange()] = Field(
        default="kl_small",
        description="YAML file, or the name of a preset. Flags override it.",
    )
    model: AnyModelConfig = KLModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    critic: CriticConfig = CriticConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()

    @property
    def images_read(self) -> int:
        """Images that a process reads for one micro-step, whose crops are its batch."""
        return self.run.train_batch_size // self.data.crops_per_image

    @property
    def train_sizes(self) -> tuple[tuple[int, int], ...]:
        """Every height and width that may be trained at, in pixels."""
        return self.sizes_at(self.data.size)

    def sizes_at(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The same, if the resolution were `size`."""
        if not self.data.aspect_ratio_buckets:
            return (size,)
        multiple = max(self.model.f, BUCKET_MULTIPLE)  # both are powers of 2
        return bucket_sizes(size, self.data.aspect_ratio_buckets, multiple=multiple)

    @property
    def critic_start(self) -> int:
        """First update (counted from 0) in which the critic learns; max_train_steps or more:
        never."""
        start = self.critic.disc_start
        return round(start * self.run.max_train_steps) if start < 1 else int(start)

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        for side in self.data.size:
            if side % self.model.f:
                near = max(int(side / self.model.f + 0.5), 1) * self.model.f
                raise ValueError(
                    f"resolution {side} is not a multiple of the model's f = {self.model.f}; the "
                    f"nearest that is: {near}"
                )
        batch, crops = self.run.train_batch_size, self.data.crops_per_image
        if batch % crops:
            near = max(round(batch / crops), 1) * crops
            raise ValueError(
                f"train_batch_size {batch} is not a multiple of crops_per_image {crops}; the "
                f"nearest that is: {near}"
            )
        if self.run.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision fp16 is refused, for two optimisers on one gradient scaler go "
                "wrong; allowed are bf16 and no"
            )
        if self.run.export_profile == "sdxl" and self.model.latent_channels != 4:
            raise ValueError(
                f"export_profile sdxl needs latent_channels 4, not {self.model.latent_channels}"
            )
        self._check_architecture()
        return self

    def _check_architecture(self) -> None:
        """Options that mean nothing to the network are refused where they are set."""
        model, kind = self.model, self.model.architecture
        if isinstance(model, VQModelConfig):
            kind = f"{kind} ({model.quantizer.type})"
            if model.likelihood and self.objective.learn_logvar:
                raise ValueError(
                    f"learn_logvar and likelihood {model.likelihood} exclude each other"
                )
            if model.likelihood and self.objective.rec_loss != ObjectiveConfig().rec_loss:
                raise ValueError(
                    f"rec_loss {self.objective.rec_loss} has no meaning with likelihood "
                    f"{model.likelihood}, which takes its place; leave it at "
                    f"{ObjectiveConfig().rec_loss}"
                )
            if model.likelihood and self.objective.rec_target:
                raise ValueError(
                    f"rec_target {self.objective.rec_target:g} has no meaning with likelihood "
                    f"{model.likelihood}, which is no error; hold the KL by kl_target"
                )
        without = f"has no meaning for the architecture {kind}"
        for name in () if model.has_kl else marked(ObjectiveConfig, NeedsKL):
            if value := getattr(self.objective, name):
                raise ValueError(f"{name} {value:g} {without}, which has no KL")
        for name in marked(ObjectiveConfig, KLTarget) if model.freeze_encoder else ():
            if value := getattr(self.objective, name):
                raise ValueError(
                    f"{name} {value:g} and freeze_encoder exclude each other: the KL "
                    "of a frozen encoder does not move"
                )
        if self.run.deterministic_posterior and model.architecture not in ("kl", "asymmetric"):
            raise ValueError(f"deterministic_posterior {without}, which has no posterior")
        if not model.has_kl and self.objective.kl_scale not in (0, ObjectiveConfig().kl_scale):
            raise ValueError(f"kl_scale {self.objective.kl_scale:g} {without}, which has no KL")
        if self.run.lookup_from_codebook and model.architecture != "vq":
            raise ValueError(f"lookup_from_codebook {without}, which has no codes")
        if self.run.lookup_from_codebook and isinstance(model, VQModelConfig):
            from latentvae.models.conv.vq import why_no_vq_model

            if reason := why_no_vq_model(model.quantizer.arguments(), model.likelihood):
                raise ValueError(
                    f"lookup_from_codebook is an option of VQModel, and this is none: {reason}"
                )
        if self.run.export_profile != "sd" and model.architecture != "kl":
            raise ValueError(f"export_profile {self.run.export_profile} {without}")
        if self.run.gradient_checkpointing and model.architecture == "dc":
            raise ValueError("gradient_checkpointing is not there for diffusers' AutoencoderDC")
        if self.run.torch_compile and self.run.gradient_checkpointing:
            raise ValueError(
                "torch_compile and gradient_checkpointing exclude each other: the compiler decides "
                "by itself what the backward pass recomputes"
            )
        if self.run.torch_compile and self.run.channels_last:
            raise ValueError(
                "torch_compile and channels_last exclude each other: the compiler fails on the "
                "backward pass of such weights"
            )
        if self.run.torch_compile and (buckets := self.data.aspect_ratio_buckets):
            raise ValueError(
                f"torch_compile has no use with aspect_ratio_buckets {buckets}: every size would "
                "be compiled for itself, and torch gives up after eight"
            )


def flat(config: BaseModel) -> dict[str, Any]:
    """Every option by its leaf name."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        values |= flat(value) if isinstance(value, BaseModel) else {name: value}
    return values


def option_names() -> list[str]:
    """Of every architecture and quantiser."""
    kinds: list[Any] = [*MODELS.values(), *(entry.config for entry in QUANTIZERS.values())]
    sections = (TrainConfig(), *(kind() for kind in kinds))
    return list(dict.fromkeys(name for section in sections for name in flat(section)))
