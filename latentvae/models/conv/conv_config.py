"""Options of networks with residual blocks and GroupNorm, and diffusers' names of the blocks."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentvae.models.model_config import ModelConfig
from latentvae.option_marks import Count, OfTheRun, Positive

# Options that have the same name in the config of the network in diffusers.
ENCODER = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")


class ConvolutionalConfig(ModelConfig):
    """Options of residual blocks with GroupNorm."""

    layers_per_block: Positive = Field(
        default=2,
        description=(
            "Number of residual blocks per level of the encoder. Each level of the decoder has one "
            "block more."
        ),
    )
    norm_num_groups: Positive = Field(
        default=32,
        description=(
            "Number of groups of each GroupNorm layer. This number must divide the number of "
            "channels of every level."
        ),
    )

    @model_validator(mode="after")
    def _check_groups(self) -> "ConvolutionalConfig":
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the width {width} of "
                    "block_out_channels"
                )
        return self


class AttentionConfig(ConvolutionalConfig):
    """Options of residual blocks with GroupNorm, of self-attention, and of the first weights."""

    init: Annotated[Literal["random", "linear"], OfTheRun()] = Field(
        default="random",
        description=(
            "Weights of a new network. `linear` starts at the linear code of the network's size: "
            "principal components of patches of the training images. The network then learns from "
            "fewer updates. `random` starts at random weights."
        ),
    )

    attention_levels: tuple[Count, ...] = Field(
        default=(),
        description=(
            "Levels of the network that have self-attention after each residual block. Level 0 has "
            "the full resolution."
        ),
    )
    mid_block_add_attention: bool = Field(
        default=True,
        description="Add self-attention to the middle block, at the lowest resolution.",
    )

    @model_validator(mode="after")
    def _check_attention(self) -> "AttentionConfig":
        self.check_levels("attention_levels", self.attention_levels)
        return self

    @model_validator(mode="after")
    def _check_init(self) -> "AttentionConfig":
        if self.init == "linear" and self.pretrained_model_name_or_path is not None:
            raise ValueError(
                "init linear is for new networks, but pretrained_model_name_or_path gives the "
                "weights. Leave init out."
            )
        if self.init == "linear" and self.pixel_likelihood is not None:
            raise ValueError(
                f"init linear needs a decoder of images, but likelihood {self.pixel_likelihood} "
                "makes it return parameters. Give --init random."
            )
        if self.init == "linear" and len(self.block_out_channels) < 2:
            raise ValueError(
                "init linear needs at least 2 levels, but block_out_channels has 1. Give --init "
                "random."
            )
        if self.init == "linear" and (reason := self.bottleneck.why_no_linear_start):
            raise ValueError(f"init linear does not work with {self.kind}: {reason}")
        return self


def block_types(num_levels: int, attention_levels: Sequence[int]) -> tuple[Any, Any]:
    """Return diffusers' names of the encoder's and the decoder's blocks."""
    levels = range(num_levels)
    down = (
        "AttnDownEncoderBlock2D" if i in attention_levels else "DownEncoderBlock2D" for i in levels
    )
    up = (
        "AttnUpDecoderBlock2D" if i in attention_levels else "UpDecoderBlock2D"
        for i in reversed(levels)
    )
    return tuple(down), tuple(up)
