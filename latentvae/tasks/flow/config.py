"""Define the options of a run that trains a flow matching model on latents."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.config.run_config import JobConfig, OptimizerConfig, RunConfig
from latentvae.option_marks import Elsewhere, MayChange, Positive, Section, Share


class LatentsConfig(Section):
    """Options of the encoded images (latents) that the model learns from."""

    latents: Annotated[tuple[str, ...], MayChange(), Elsewhere("train_data_dir data data_dir")] = (
        Field(
            default=(),
            description=(
                "Folders of latents that `latentvae encode` wrote. All folders must come from the "
                "same autoencoder. The model learns from the latents of all folders together, such "
                "as latents of images and of their mirror images (`latentvae encode --flip`)."
            ),
        )
    )
    validation_latents: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Folder of latents for validation. By default, some of the images in `latents` are "
            "held out (see validation_share)."
        ),
    )
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.05,
        description=(
            "Fraction of the images that is held out for validation. A hash of the image's name "
            "decides whether an image is held out, so adding images does not change the choice for "
            "the other images."
        ),
    )
    max_validation_images: Annotated[Positive, MayChange()] = Field(
        default=1000,
        description=(
            "Largest number of images in a validation. If there are more validation images, this "
            "many are chosen at equal distances in the list of all validation images."
        ),
    )
    autoencoder: Annotated[str | None, MayChange(), Elsewhere("vae vae_path")] = Field(
        default=None,
        description=(
            "Autoencoder that made the latents. Training needs this autoencoder to decode sample "
            "pictures, and the exported model contains it. By default, this is the "
            "autoencoder whose name is in the file manifest.json of the latents."
        ),
    )
    normalization: Literal["model", "channel"] = Field(
        default="model",
        description=(
            "How latents are scaled to a variance of about 1. `model` shifts and scales latents as "
            "diffusers' pipelines do for this autoencoder. `channel` uses the mean and the "
            "standard deviation of each channel, measured on the training latents. With `channel`, "
            "the exported model needs latentvae's FlowPipeline and does not load with diffusers "
            "alone. The exported model also needs FlowPipeline if the autoencoder's pipelines "
            "shift latents."
        ),
    )
    posterior_sample: bool = Field(
        default=True,
        description=(
            "In each update, draw a new sample from the posterior of each image. This has an "
            "effect only on latents that were encoded with `latentvae encode --moments`. "
            "Without `--moments`, or if this option is off, the model learns from the posterior "
            "means."
        ),
    )


class FlowConfig(Section):
    """Options of the network, of its condition (class or text) and of the noise levels."""

    width: Annotated[Positive, Elsewhere("dim d_model hidden_size")] = Field(
        default=256,
        description=(
            "Number of channels of each transformer block. This number must be a multiple of "
            "head_dim."
        ),
    )
    depth: Annotated[Positive, Elsewhere("n_layer num_layers layers")] = Field(
        default=6, description="Number of transformer blocks."
    )
    head_dim: Annotated[Positive, Elsewhere("attention_head_dim")] = Field(
        default=32, description="Number of channels of each attention head."
    )
    patch_size: Positive = Field(
        default=1,
        description=(
            "Side of a patch, in positions of the latent. Each patch becomes one token of the "
            "transformer. The patch size must divide the height and width of the latent. Larger "
            "patches give fewer tokens, which is faster."
        ),
    )
    condition: Literal["auto", "class", "text", "none"] = Field(
        default="auto",
        description=(
            "Condition that the model gets with an image. `class` is the image's class. `text` is "
            "the image's caption (see captions and text_encoder). `none` is no condition. `auto` "
            "means `text` if text_encoder is given, else `class` if the latents have classes, else "
            "`none`."
        ),
    )
    condition_dropout: Annotated[Share, Elsewhere("class_dropout_prob cond_drop_prob")] = Field(
        default=0.1,
        description=(
            "Probability that an image is used without its condition in an update. The choice is "
            "random and new in each update. Sampling with classifier-free guidance needs a value "
            "above 0."
        ),
    )
    text_encoder: str | None = Field(
        default=None,
        description=(
            "Frozen text encoder for the captions: a folder or Hub id that the package "
            "transformers loads, such as google-t5/t5-base. `--condition text` needs this option. "
            "With a T5 encoder and most autoencoders (see docs/flow.md), the exported model loads "
            "with diffusers alone, without latentvae."
        ),
    )
    captions: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            'JSON Lines file of captions. Each line is {"id": ..., "text": ...}, where `id` is the '
            "name of the image that was encoded. By default, the captions are the ones that "
            "`latentvae encode` found beside the images."
        ),
    )
    shift: Annotated[float, Field(gt=0.0)] | Literal["auto"] = Field(
        default="auto",
        description=(
            "Shift of the noise levels in training and sampling. 1 is no shift. With values above "
            "1, high noise levels occur more often. `auto` is sqrt(n / 4096), but at least 1, "
            "where n is the number of values in a latent. The best shift depends on the latents, "
            "so try 2 and 4 too."
        ),
    )
    solver: Annotated[Literal["euler", "heun"], MayChange()] = Field(
        default="euler",
        description=(
            "Solver of the differential equation that turns noise into latents, for the sample "
            "pictures during training. `heun` evaluates the network twice in each step and is more "
            "exact than `euler`."
        ),
    )
    sampling_steps: Annotated[Positive, MayChange()] = Field(
        default=25,
        description=(
            "Number of solver steps from noise to latent, for the sample pictures during training."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "FlowConfig":
        if self.width % self.head_dim:
            near = max(round(self.width / self.head_dim), 1) * self.head_dim
            raise ValueError(
                f"width {self.width} is not a multiple of head_dim ({self.head_dim}). The nearest "
                f"multiple is {near}."
            )
        texts = {"captions": self.captions, "text_encoder": self.text_encoder}
        given = [name for name, value in texts.items() if value is not None]
        if self.condition in ("class", "none") and given:
            raise ValueError(
                f"{given[0]} has no meaning with condition {self.condition}. Leave {given[0]} or "
                "condition out."
            )
        if self.text_encoder is None and (self.condition == "text" or given):
            asks = "captions" if given else "condition text"
            raise ValueError(
                f"{asks} needs a text_encoder. Give a folder or Hub id of a frozen text encoder, "
                "such as --text_encoder google-t5/t5-base."
            )
        return self


class FlowRunConfig(RunConfig):
    """Options of the training run: its length, batch size, precision, files and logs."""

    gradient_checkpointing: bool = Field(
        default=False,
        description=(
            "Recompute activations in the backward pass. This saves memory but takes more time."
        ),
    )
    num_sample_images: Annotated[Positive, MayChange()] = Field(
        default=40,
        description=(
            "Number of sampled images in each PNG that training writes to the folder `samples` in "
            "output_dir. A PNG shows at most 10 classes or captions."
        ),
    )


class LatentFlowConfig(JobConfig):
    """All options of a run that trains a flow matching model."""

    config: Annotated[str, MayChange()] = Field(
        default="flow_small",
        description=(
            "YAML file with options, or the name of a preset (a YAML file that comes with this "
            "package). Flags override the values in the file or preset."
        ),
    )
    latents: LatentsConfig = LatentsConfig()
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: FlowRunConfig = FlowRunConfig()
