"""Define the options of a run that trains a flow matching model on latents."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.config.run_config import JobConfig, OptimizerConfig, RunConfig
from latentvae.option_marks import Elsewhere, MayChange, Positive, Section, Share


class LatentsConfig(Section):
    """Options of the latents that the model learns from."""

    latents: Annotated[tuple[str, ...], MayChange(), Elsewhere("train_data_dir data data_dir")] = (
        Field(
            default=(),
            description=(
                "Folders of latents that `latentvae encode` wrote with one autoencoder. Several "
                "folders are joined, such as latents of images and of their mirror images "
                "(`latentvae encode --flip`)."
            ),
        )
    )
    validation_latents: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Folder of latents for validation. By default, a share of the images in `latents` is "
            "held out (see validation_share)."
        ),
    )
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.05,
        description=(
            "Share of the images that is held out for validation. A hash of the image's name "
            "decides whether an image is held out."
        ),
    )
    max_validation_images: Annotated[Positive, MayChange()] = Field(
        default=1000,
        description=(
            "Largest number of images in a validation. If there are more validation images, this "
            "many of them are chosen, evenly spread."
        ),
    )
    autoencoder: Annotated[str | None, MayChange(), Elsewhere("vae vae_path")] = Field(
        default=None,
        description=(
            "Autoencoder that made the latents. The run needs it for pictures of samples and for "
            "the export. By default, the run uses the autoencoder that manifest.json in the "
            "latents' folder records."
        ),
    )
    normalization: Literal["model", "channel"] = Field(
        default="model",
        description=(
            "How latents are scaled to a variance of about 1. `model` shifts and scales them as "
            "the pipelines of the autoencoder do. `channel` uses the mean and the standard "
            "deviation of each channel, measured on the training latents. With `channel`, and for "
            "autoencoders whose pipelines shift latents, the export loads with latentvae's "
            "FlowPipeline, and not with diffusers alone."
        ),
    )
    posterior_sample: bool = Field(
        default=True,
        description=(
            "Draw new samples of the posteriors in each update. This works if the latents were "
            "encoded with `latentvae encode --moments`. Without this option, the model learns from "
            "the posterior means."
        ),
    )


class FlowConfig(Section):
    """Options of the network, of its condition and of the noise levels."""

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
            "Side of a patch, in positions of the latent. Each patch becomes one token. The patch "
            "size must divide the height and width of the latent. Larger patches compute faster."
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
            "Probability with which an image loses its condition, drawn anew in each update. "
            "Sampling with classifier-free guidance needs a value above 0."
        ),
    )
    text_encoder: str | None = Field(
        default=None,
        description=(
            "Frozen encoder of captions, which condition `text` needs: a folder or Hub id that the "
            "package transformers loads, such as google-t5/t5-base. With a T5 encoder and most "
            "autoencoders (see docs/flow.md), the export loads without latentvae."
        ),
    )
    captions: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            'JSON Lines file of captions. Each line is {"id": ..., "text": ...}, and `id` is the '
            "name of an image in the latents. By default, the captions are the ones that "
            "`latentvae encode` found beside the images."
        ),
    )
    shift: Annotated[float, Field(gt=0.0)] | Literal["auto"] = Field(
        default="auto",
        description=(
            "Shift of the noise levels in training and sampling. 1 is no shift. Values above 1 "
            "give more weight to high noise. `auto` is the square root of (number of values in a "
            "latent / 4096), at least 1. The best shift depends on the latents, so also try 2 and "
            "4."
        ),
    )
    solver: Annotated[Literal["euler", "heun"], MayChange()] = Field(
        default="euler",
        description=(
            "Solver that draws the sample pictures of the run. `heun` evaluates the network twice "
            "in each step and is more exact than `euler`."
        ),
    )
    sampling_steps: Annotated[Positive, MayChange()] = Field(
        default=25,
        description="Number of steps from noise to latent for the sample pictures of the run.",
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
                f"{given[0]} has no meaning with condition {self.condition}. Leave one of them out."
            )
        if self.text_encoder is None and (self.condition == "text" or given):
            asks = "captions" if given else "condition text"
            raise ValueError(
                f"{asks} needs a text_encoder. Give a folder or Hub id of a frozen text encoder, "
                "such as --text_encoder google-t5/t5-base."
            )
        return self


class FlowRunConfig(RunConfig):
    """Options of the run: its length, batch size, precision, files and logs."""

    gradient_checkpointing: bool = Field(
        default=False,
        description=(
            "Recompute activations in the backward pass. This saves memory but takes more time."
        ),
    )
    num_sample_images: Annotated[Positive, MayChange()] = Field(
        default=40,
        description=(
            "Number of sampled images in each PNG of the run's folder `samples`. A PNG shows at "
            "most 10 classes or captions."
        ),
    )


class LatentFlowConfig(JobConfig):
    """All options of a run that trains a flow matching model."""

    config: Annotated[str, MayChange()] = Field(
        default="flow_small",
        description=(
            "YAML file with options, or the name of a preset. Flags override the values in the "
            "file or preset."
        ),
    )
    latents: LatentsConfig = LatentsConfig()
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: FlowRunConfig = FlowRunConfig()
