"""Options that all networks of vision transformers share."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.models.model_config import ModelConfig
from latentvae.option_marks import Elsewhere, Positive

# Options that have the same name in the config of the network.
SHAPE = (
    "patch_size",
    "encoder_channels",
    "encoder_blocks",
    "decoder_channels",
    "decoder_blocks",
    "attention_head_dim",
    "decoder_head",
    "latent_channels",
)


class ViTConfig(ModelConfig):
    """Options of an encoder and a decoder that are vision transformers.

    The downsampling factor f equals the option `patch_size`.
    """

    patch_size: Positive = Field(
        default=8,
        description=(
            "Side of a patch in pixels. Each patch becomes one latent position, so this number is "
            "also the downsampling factor. The height and width of images must be multiples of "
            "this number."
        ),
    )
    encoder_channels: Annotated[Positive, Elsewhere("hidden_size encoder_width")] = Field(
        default=768, description="Number of channels of a token in the encoder."
    )
    encoder_blocks: Annotated[Positive, Elsewhere("encoder_depth encoder_layers")] = Field(
        default=12, description="Number of transformer blocks of the encoder."
    )
    decoder_channels: Annotated[Positive, Elsewhere("decoder_hidden_size decoder_width")] = Field(
        default=768, description="Number of channels of a token in the decoder."
    )
    decoder_blocks: Annotated[Positive, Elsewhere("decoder_depth decoder_layers")] = Field(
        default=12,
        description=(
            "Number of transformer blocks of the decoder. A larger decoder improves the "
            "reconstructions more than a larger encoder does."
        ),
    )
    attention_head_dim: Positive = Field(
        default=64,
        description=(
            "Number of channels of an attention head. This number must be a multiple of 4, and it "
            "must divide encoder_channels and decoder_channels."
        ),
    )
    decoder_head: Literal["linear", "conv"] = Field(
        default="linear",
        description=(
            "Last part of the decoder. `linear` computes the pixels of each patch from the token "
            "of this patch. `conv` ends in two convolutions at full resolution, so that the "
            "borders between patches are not visible. `conv` needs more memory than `linear`."
        ),
    )

    @model_validator(mode="after")
    def _check_heads(self) -> "ViTConfig":
        width = self.attention_head_dim
        if width % 4:
            near = max(round(width / 4), 1) * 4
            raise ValueError(
                f"attention_head_dim {width} is not a multiple of 4. The nearest multiple is "
                f"{near}."
            )
        for name in ("encoder_channels", "decoder_channels"):
            if (channels := getattr(self, name)) % width:
                near = max(round(channels / width), 1) * width
                raise ValueError(
                    f"{name} {channels} is not a multiple of attention_head_dim {width}. The "
                    f"nearest multiple is {near}."
                )
        return self

    @property
    def f(self) -> int:
        return self.patch_size
