"""Options that the networks share; those of one kind sit beside it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.models.single_file import SingleFileKind
from latentvae.option_marks import ChosenByPreset, Elsewhere, OfTheRun, Positive, Section, marked

Widths = tuple[Positive, ...]


class Pretrained(Section):
    """What a fine-tuning starts from."""

    pretrained_model_name_or_path: Annotated[str | None, OfTheRun()] = Field(
        default=None,
        description=(
            "Fine-tune this network instead of starting from nothing: a diffusers folder, a "
            "single .safetensors file, or a Hub id (owner/name/folder). Its own shape counts."
        ),
    )
    freeze_encoder: Annotated[bool, OfTheRun()] = Field(
        default=False,
        description=(
            "Train the decoder alone: latents, scaling and shift stay those of the pretrained "
            "network, and generators trained on them stay valid."
        ),
    )

    @model_validator(mode="after")
    def _check_frozen(self) -> "Pretrained":
        if self.freeze_encoder and self.pretrained_model_name_or_path is None:
            raise ValueError(
                "freeze_encoder needs pretrained_model_name_or_path: an encoder that has learned "
                "nothing cannot be kept"
            )
        return self


class ModelConfig(Pretrained):
    """What all networks have, and what of them depends on their options.

    Attributes:
        architecture: the family's name, which chooses the class in a preset.
    """

    architecture: Annotated[Any, ChosenByPreset(), OfTheRun(), Elsewhere("arch model_type")]
    block_out_channels: Widths = Field(
        default=(128, 256, 512, 512),
        description=(
            "Width of each level, from full resolution down; f = 2 ** (number of levels - 1)."
        ),
    )
    latent_channels: Annotated[Positive, Elsewhere("z_channels")] = Field(
        default=4, description="Latent channels d: 4 serves the SD family, 16 SD3 and FLUX."
    )

    @property
    def kind(self) -> str:
        """The network in a few words, for messages."""
        return self.architecture

    @property
    def posterior(self) -> Literal["gaussian", "categorical"] | None:
        """What latents are drawn from; None where they are not."""
        return None

    @property
    def has_kl(self) -> bool:
        """Whether its latent has a KL divergence to a prior."""
        return self.bottleneck.has_kl

    @property
    def kl_channels(self) -> int:
        """Channels of the latent that have a KL of their own."""
        return self.latent_channels

    @property
    def bottleneck(self) -> BottleneckConfig:
        """Options of what turns encoder features into its latent; here nothing does."""
        return BottleneckConfig()

    @property
    def has_codes(self) -> bool:
        """Whether it is a tokenizer."""
        return False

    @property
    def pixel_likelihood(self) -> str | None:
        """The likelihood whose parameters the decoder gives; None where it gives images."""
        return None

    @property
    def draws_noise(self) -> bool:
        """Whether training draws random numbers even at the mode of the posterior."""
        return False

    @property
    def f(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    def shape(self) -> dict[str, Any]:
        """What the family's builder takes: all but what a fine-tuning starts from."""
        return self.model_dump(exclude=set(marked(type(self), OfTheRun)))

    def check_levels(self, name: str, levels: tuple[int, ...]) -> None:
        for level in levels:
            if level >= len(self.block_out_channels):
                raise ValueError(
                    f"{name} names level {level}, but block_out_channels has levels 0 to "
                    f"{len(self.block_out_channels) - 1}"
                )

    def check_length(self, name: str, values: tuple[int, ...]) -> None:
        if len(values) != len(self.block_out_channels):
            raise ValueError(
                f"{name} has {len(values)} levels, but block_out_channels has "
                f"{len(self.block_out_channels)}"
            )


class SingleFile(Pretrained):
    """Of Stable Diffusion's kinds alone."""

    pretrained_family: Annotated[SingleFileKind | None, OfTheRun()] = Field(
        default=None,
        description="Of a single file: whose autoencoder it is, which says how latents are scaled.",
    )


def levels_with(kind: str, blocks: Sequence[str]) -> tuple[int, ...]:
    """Levels whose block has `kind` in its name."""
    return tuple(i for i, block in enumerate(blocks) if kind in block)
