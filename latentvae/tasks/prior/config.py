"""Define the options of a run that trains a prior on tokens."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.config.run_config import JobConfig, OptimizerConfig, RunConfig
from latentvae.option_marks import Elsewhere, MayChange, Positive, Section, Share

BYTES = "bytes"  # value of `text_encoder` for the encoder that is trained with the prior


class TokensConfig(Section):
    """Options of the encoded images (tokens) that the prior learns from."""

    tokens: Annotated[tuple[str, ...], MayChange(), Elsewhere("train_data_dir data data_dir")] = (
        Field(
            default=(),
            description=(
                "Folders of tokens that `latentvae encode` wrote. All folders must come from the "
                "same tokenizer. The prior learns from the tokens of all folders together."
            ),
        )
    )
    validation_tokens: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Folder of tokens for validation. By default, some of the images in `tokens` are held "
            "out (see validation_share)."
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
    tokenizer: Annotated[str | None, MayChange(), Elsewhere("vq_model vqvae")] = Field(
        default=None,
        description=(
            "Tokenizer that made the tokens. Training needs this tokenizer to decode sample "
            "pictures, and the exported model contains it. By default, training uses the tokenizer "
            "whose name is in the file manifest.json of the tokens' folder."
        ),
    )
    shuffle_tokens: bool = Field(
        default=False,
        description=(
            "Shuffle the positions of the tokens of each image. If the tokenizer has several "
            "levels of codes, each level is shuffled separately. Use this option only as a control "
            "experiment: the prior's loss should then be clearly higher than without shuffling."
        ),
    )


class NetworkConfig(Section):
    """Options of the prior's network and of its condition (class or text)."""

    width: Annotated[Positive, Elsewhere("dim n_embd d_model hidden_size")] = Field(
        default=256,
        description=(
            "Number of channels of each transformer block. This number must be a multiple of 4 "
            "times num_heads."
        ),
    )
    depth: Annotated[Positive, Elsewhere("n_layer num_layers layers")] = Field(
        default=6, description="Number of transformer blocks."
    )
    num_heads: Annotated[Positive, Elsewhere("n_head heads")] = Field(
        default=8, description="Number of attention heads in each transformer block."
    )
    dropout: Share = Field(
        default=0.1,
        description=(
            "Probability (0 to 1) with which a value is set to 0 in training, in each transformer "
            "block."
        ),
    )
    condition: Literal["auto", "class", "text", "none"] = Field(
        default="auto",
        description=(
            "Condition that the prior gets with an image. `class` is the image's class. `text` is "
            "the image's caption (see captions and text_encoder). `none` is no condition. `auto` "
            "means `text` if all images have captions, else `class` if the images have classes, "
            "else `none`. If only some images have captions and no image has a class, give `none` "
            "or the other captions."
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
    captions: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            'JSON Lines file of captions. Each line is {"id": ..., "text": ...}, where `id` is the '
            "name of the image that was encoded. By default, the captions are the ones that "
            "`latentvae encode` found beside the images."
        ),
    )
    text_encoder: str = Field(
        default=BYTES,
        description=(
            "Encoder of captions. `bytes` is a small network that reads a caption byte by byte and "
            "is trained together with the prior. You may also give a frozen encoder: a folder or "
            "Hub id that the package transformers loads, such as a T5 or CLIP text encoder."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "NetworkConfig":
        if self.width % (4 * self.num_heads):
            step = 4 * self.num_heads
            near = max(round(self.width / step), 1) * step
            raise ValueError(
                f"width {self.width} is not a multiple of 4 times num_heads ({step}). The nearest "
                f"multiple is {near}."
            )
        if self.condition in ("class", "none"):
            for name, given in (
                ("captions", self.captions is not None),
                ("text_encoder", self.text_encoder != BYTES),
            ):
                if given:
                    raise ValueError(
                        f"{name} has no meaning with condition {self.condition}. Leave {name} or "
                        "condition out."
                    )
        return self


class PriorRunConfig(RunConfig):
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


class PriorConfig(JobConfig):
    """All options of a run that trains a prior."""

    config: Annotated[str, MayChange()] = Field(
        default="prior_small",
        description=(
            "YAML file with options, or the name of a preset (a YAML file that comes with this "
            "package). Flags override the values in the file or preset."
        ),
    )
    tokens: TokensConfig = TokensConfig()
    prior: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: PriorRunConfig = PriorRunConfig()
