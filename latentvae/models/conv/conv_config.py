"""Options of networks with residual blocks and GroupNorm, and diffusers' names of the blocks."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentvae.models.model_config import LevelsConfig
from latentvae.option_marks import Count, OfTheRun, Positive

# Options that have the same name in the config of the network in diffusers.
ENCODER = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")


class ConvolutionalConfig(LevelsConfig):
    """Options of residual blocks with GroupNorm."""

    layers_per_block: Positive = Field(
        default=2,
        description=(
            "Number of residual blocks per level of the encoder. Each level of the decoder has one "
            "more residual block than this number."
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
    """Options of residual blocks with GroupNorm, of self-attention, and of the initial weights."""

    init: Annotated[Literal["random", "linear", "auto"], OfTheRun()] = Field(
        default="random",
        description=(
            "Initial weights of a new network. With `linear`, the new network first computes a "
            "PCA: its latents are the principal components of patches of training images. From "
            "these initial weights, training needs fewer updates to reach the same quality. "
            "`random` draws random weights. `auto` means `linear` if the network is new and "
            "supports `linear`, else `random`."
        ),
    )

    attention_levels: tuple[Count, ...] = Field(
        default=(),
        description=(
            "Indices of the levels of the network that have self-attention after each residual "
            "block. Level 0 has the full resolution, and each further level has half the "
            "resolution of the level before."
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
        if self.init == "linear" and (reason := self.why_no_linear_start):
            raise ValueError(f"init linear {reason}")
        return self

    def starts_linear(self, image_channels: int) -> bool:
        """Return whether a new network is initialised to compute a linear code (PCA of patches)."""
        if self.init != "auto":
            return self.init == "linear"
        widths = {self.block_out_channels[-1]: 1, self.block_out_channels[0]: image_channels}
        return not self.why_no_linear_start and all(
            norm_capacity(width, self.norm_num_groups) >= numbers
            for width, numbers in widths.items()
        )

    @property
    def why_no_linear_start(self) -> str:
        """The reason why the new network cannot compute a linear code, with advice, or ""."""
        if self.pretrained_model_name_or_path is not None:
            return (
                "is for new networks, but pretrained_model_name_or_path gives the weights. Leave "
                "init out."
            )
        if self.pixel_likelihood is not None:
            return (
                f"needs a decoder of images, but likelihood {self.pixel_likelihood} makes the "
                "decoder return parameters. Give --init random."
            )
        if len(self.block_out_channels) < 2:
            return "needs at least 2 levels, but block_out_channels has 1. Give --init random."
        if reason := self.bottleneck.why_no_linear_start:
            return f"does not work with {self.kind}: {reason}"
        return ""


def norm_capacity(channels: int, groups: int) -> int:
    """Return how many values x, each as channels x and -x, a GroupNorm and a SiLU can preserve.

    A pair of channels keeps the value x, because silu(x) - silu(-x) = x. Each group of channels
    with such pairs also needs two constant channels, see `linear_start`.
    """
    return max((channels // groups - 2) // 2, 0) * groups


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
