"""Define the options of a run that trains an autoencoder, and check them before the run starts.

`TrainConfig` holds the values of a YAML preset, and flags override them (see
`latentvae.cli.train`). No two sections have an option of the same name, so the name of a flag does
not need the name of a section. Options that also exist in Hugging Face's training scripts have the
same names as in these scripts.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentvae.config import presets
from latentvae.config.run_config import JobConfig, OptimizerConfig, RunConfig
from latentvae.data.data_config import DataConfig
from latentvae.losses.discriminator_config import DiscriminatorConfig
from latentvae.losses.objective_config import KLTarget, NeedsKL, ObjectiveConfig
from latentvae.models.conv.kl import KLModelConfig
from latentvae.models.posterior import PosteriorConfig
from latentvae.models.table import FAMILIES, AnyModelConfig
from latentvae.option_marks import DecidesTheWatch, MayChange, Positive, marked
from latentvae.tasks.autoencoder.posterior_checks import check_posterior
from latentvae.tasks.image_config import ImageJobConfig

BUCKET_MULTIPLE = 8  # the height and width of each aspect-ratio bucket are multiples of this


class AutoencoderRunConfig(RunConfig):
    """Options of the training run: its length, batch size, precision, files and logs."""

    gradient_checkpointing: bool = Field(
        default=False,
        description=(
            "Recompute activations in the backward pass. This saves memory but takes more time."
        ),
    )
    channels_last: bool = Field(
        default=False,
        description=(
            "Use torch's memory format channels_last for images and weights. This makes "
            "convolutions faster on GPUs with bf16, but it makes backward passes slower on CPUs."
        ),
    )
    torch_compile: bool = Field(
        default=False,
        description=(
            "Compile the blocks of the network with torch.compile, which needs a C++ compiler, or "
            "a GPU with Triton. The compilation takes minutes at the start of the run."
        ),
    )
    # This option may change on resume, because it changes only the rounding.
    winograd: Annotated[bool, MayChange()] = Field(
        default=True,
        description=(
            "Compute 3 x 3 convolutions and their gradients with fewer multiplications (Winograd's "
            "method). This option has an effect only on CPUs in float32. The rounding errors are "
            "about 4e-6 times the size of the values."
        ),
    )
    deterministic_posterior: bool = Field(
        default=False,
        description="In training, decode the mode of the posterior instead of a sample.",
    )
    num_sample_images: Annotated[Positive, MayChange()] = Field(
        default=6,
        description=(
            "Number of validation images in each grid of sample images that training writes."
        ),
    )
    export_profile: Annotated[Literal["sd", "sdxl", "sd3"], MayChange()] = Field(
        default="sd",
        description=(
            "Diffusion pipelines that the exported model is for. This option decides how the "
            "model's config describes the scale of the latents. `sd` writes a scaling factor, "
            "which all pipelines can use. `sd3` (also for FLUX) writes a scaling factor and a "
            "shift. `sdxl` writes the mean and the standard deviation of each channel."
        ),
    )
    lookup_from_codebook: Annotated[bool, MayChange()] = Field(
        default=False,
        description=(
            "Export the tokenizer as a VQModel for aMUSEd, a text-to-image pipeline of diffusers. "
            "This pipeline passes indices of codes to the decoder, and expects pixels in [0, 1]. "
            "Leave this option off for other pipelines."
        ),
    )


class TrainConfig(ImageJobConfig):
    """All options of a run that trains an autoencoder or a tokenizer."""

    config: Annotated[str, MayChange()] = Field(
        default="kl_small",
        description=(
            "YAML file with options, or the name of a preset (a YAML file that comes with this "
            "package). Flags override the values in the file or preset."
        ),
    )
    model: AnyModelConfig = KLModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: AutoencoderRunConfig = AutoencoderRunConfig()

    def may_change(self, then: JobConfig) -> frozenset[str]:
        assert isinstance(then, TrainConfig)
        names = super().may_change(then)
        if self.discriminator.disc_watch == then.discriminator.disc_watch == "disable":
            return names - set(marked(TrainConfig, DecidesTheWatch))
        return names

    def how_to_branch(self, then: JobConfig, *, folder: str) -> str:
        assert isinstance(then, TrainConfig)
        if self.model.shape() != then.model.shape():
            return ""  # weights of another shape cannot be loaded
        export = Path(folder) / "export"
        first = "" if export.is_dir() else f"`latentvae export {folder} --out {export}`, then "
        both = self.discriminator.disc_scale and then.discriminator.disc_scale
        discriminator = f" --discriminator_from {folder}" if both else ""
        return (
            " To train that run's model further with the new options, give another output_dir and "
            f"{first}--pretrained_model_name_or_path {export}{discriminator}."
        )

    @property
    def bucket_multiple(self) -> int:
        return math.lcm(self.model.f, BUCKET_MULTIPLE)

    @property
    def low_rank(self) -> int:
        """Rank of the adapters (LoRA) that fine-tuning trains. 0 means no adapters."""
        return self.model.lora_rank if isinstance(self.model, KLModelConfig) else 0

    @property
    def starts_linear(self) -> bool:
        """Whether a new network starts as a linear code (principal components of image patches)."""
        return self.model.starts_linear(self.data.image_channels)

    @property
    def discriminator_start(self) -> int:
        """First update (counted from 0) in which the discriminator learns.

        If this number is max_train_steps or more, the discriminator never learns.
        """
        start = self.discriminator.disc_start
        return round(start * self.run.max_train_steps) if start < 1 else int(start)

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        # sizes
        for side in self.data.size:
            if side % self.model.f:
                near = max(int(side / self.model.f + 0.5), 1) * self.model.f
                raise ValueError(
                    f"resolution {side} is not a multiple of the model's f = {self.model.f}. The "
                    f"nearest multiple is {near}."
                )
        self.check_batch()

        # the run
        if self.run.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision fp16 fails with two optimizers on one gradient scaler. Use bf16 "
                "or no instead."
            )
        if self.run.export_profile == "sdxl" and self.model.latent_channels != 4:
            raise ValueError(
                f"export_profile sdxl needs latent_channels 4, not {self.model.latent_channels}"
            )
        self._check_architecture()
        if isinstance(self.model, PosteriorConfig):
            check_posterior(self.model, self.objective, self.run.deterministic_posterior)
        return self

    def _check_architecture(self) -> None:
        """Check that every option that is set applies to the chosen network.

        Raises:
            ValueError: an option does not apply, or two options exclude each other. The message
                names the options.
        """
        model, family = self.model, FAMILIES[self.model.architecture]
        without = f"has no meaning for the architecture {model.kind}"

        # the objective
        if (likelihood := model.pixel_likelihood) is not None:
            self._check_likelihood(likelihood)
        for name in () if model.has_kl else marked(ObjectiveConfig, NeedsKL):
            if value := getattr(self.objective, name):
                raise ValueError(f"{name} {value:g} {without}, which has no KL")
        for name in marked(ObjectiveConfig, KLTarget) if model.freeze_encoder else ():
            if value := getattr(self.objective, name):
                raise ValueError(
                    f"{name} {value:g} and freeze_encoder exclude each other: the KL "
                    f"of a frozen encoder does not change. Leave {name} or freeze_encoder out."
                )
        if not model.has_kl and self.objective.kl_scale not in (0, ObjectiveConfig().kl_scale):
            raise ValueError(f"kl_scale {self.objective.kl_scale:g} {without}, which has no KL")

        # adapters
        if (rank := self.low_rank) and self.optimizer.optimizer == "muon":
            raise ValueError(
                f"lora_rank {rank} and optimizer muon exclude each other, because Muon is made for "
                "whole matrices. Give --optimizer adamw."
            )
        if rank and self.run.torch_compile:
            raise ValueError(f"lora_rank {rank} and torch_compile exclude each other.")

        # the run
        if self.run.deterministic_posterior and model.posterior != "gaussian":
            raise ValueError(f"deterministic_posterior {without}, which has no posterior")
        if self.run.lookup_from_codebook and not model.has_codes:
            raise ValueError(f"lookup_from_codebook {without}, which has no codes")
        if self.run.lookup_from_codebook and (reason := family.why_not_stock(model.shape())):
            raise ValueError(
                f"lookup_from_codebook needs a network that can be a VQModel, but {reason}"
            )
        if self.run.export_profile not in family.profiles:
            raise ValueError(f"export_profile {self.run.export_profile} {without}")
        if self.run.gradient_checkpointing and (reason := family.why_no_checkpointing):
            raise ValueError(f"gradient_checkpointing {reason}")

        # options that exclude torch_compile
        if self.run.torch_compile and self.run.gradient_checkpointing:
            raise ValueError(
                "torch_compile and gradient_checkpointing exclude each other, because the compiler "
                "itself decides what the backward pass recomputes. Leave torch_compile or "
                "gradient_checkpointing out."
            )
        if self.run.torch_compile and self.run.channels_last:
            raise ValueError(
                "torch_compile and channels_last exclude each other, because the compiler fails in "
                "the backward pass of channels_last weights. Leave torch_compile or channels_last "
                "out."
            )
        if self.run.torch_compile and (buckets := self.data.aspect_ratio_buckets):
            raise ValueError(
                f"torch_compile does not work with aspect_ratio_buckets {buckets}, because every "
                "size is compiled separately and torch stops compiling after eight sizes. Leave "
                "torch_compile or aspect_ratio_buckets out."
            )

    def _check_likelihood(self, likelihood: str) -> None:
        """Check that no pixel loss is set, because the decoder's likelihood replaces it."""
        if self.objective.learn_logvar:
            raise ValueError(
                f"learn_logvar and likelihood {likelihood} exclude each other. Leave learn_logvar "
                "or likelihood out."
            )
        if self.objective.rec_loss != ObjectiveConfig().rec_loss:
            raise ValueError(
                f"rec_loss {self.objective.rec_loss} has no meaning, because likelihood "
                f"{likelihood} replaces it. Leave it at {ObjectiveConfig().rec_loss}."
            )
        if scale := self.objective.logit_laplace_scale:
            raise ValueError(
                f"logit_laplace_scale {scale:g} needs a decoder that returns pixels, but with "
                f"likelihood {likelihood} the decoder returns the parameters of a distribution. "
                "Leave logit_laplace_scale out."
            )
        if self.objective.rec_target:
            raise ValueError(
                f"rec_target {self.objective.rec_target:g} needs a pixel error (rec_loss l1 or "
                f"l2), but likelihood {likelihood} replaces it. Use kl_target instead."
            )


def load_preset(name_or_path: str) -> TrainConfig:
    """Return the configuration from a YAML file, or from the preset of this name.

    Raises:
        UserError: the file or preset does not exist, the YAML cannot be read, or an option is
            unknown or out of range.
    """
    return presets.load_preset(name_or_path, TrainConfig)


def parse(values: dict[str, Any], *, source: str) -> TrainConfig:
    """Return the options after a check of all names and values.

    Args:
        values: dict from sections (groups of options, such as `data`) to dicts of options.
        source: the file or command line that the options come from, for error messages.
    """
    return presets.parse(values, TrainConfig, source=source)
