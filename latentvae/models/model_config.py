"""Options that all networks share. Each network's own options are in the file of that network."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.models.single_file import SingleFileKind
from latentvae.option_marks import ChosenByPreset, Elsewhere, OfTheRun, Positive, Section, marked

Widths = tuple[Positive, ...]


class Pretrained(Section):
    """Options of the pretrained network that fine-tuning starts from."""

    pretrained_model_name_or_path: Annotated[str | None, OfTheRun()] = Field(
        default=None,
        description=(
            "Fine-tune this pretrained network instead of training a new one. Give a diffusers "
            "folder, a single .safetensors file or a Hub id (owner/name/folder). The network that "
            "you train then has the shape of the pretrained network."
        ),
    )
    variant: Annotated[str | None, OfTheRun()] = Field(
        default=None,
        description=(
            "Variant of the pretrained weights, such as fp16. By default, weights without a "
            "variant name are loaded. If the weights exist only in a single variant, this variant "
            "is loaded."
        ),
    )
    freeze_encoder: Annotated[bool, OfTheRun()] = Field(
        default=False,
        description=(
            "Train only the decoder. The latents, their scaling and their shift stay as in the "
            "pretrained network. Generators (such as diffusion models) that were trained on these "
            "latents therefore still work with the new decoder."
        ),
    )

    @model_validator(mode="after")
    def _check_frozen(self) -> "Pretrained":
        if self.freeze_encoder and self.pretrained_model_name_or_path is None:
            raise ValueError(
                "freeze_encoder needs pretrained_model_name_or_path, because the encoder of a new "
                "network is untrained"
            )
        return self


class ModelConfig(Pretrained):
    """Options of every network, and the properties that follow from these options.

    Attributes:
        architecture: name of the kind of network. This name decides which options the section
            `model` of a config has.
    """

    architecture: Annotated[Any, ChosenByPreset(), OfTheRun(), Elsewhere("arch model_type")]
    latent_channels: Annotated[Positive, Elsewhere("z_channels")] = Field(
        default=4,
        description=(
            "Number of latent channels. Stable Diffusion has 4 latent channels. SD3 and FLUX have "
            "16 latent channels."
        ),
    )

    def starts_linear(self, image_channels: int) -> bool:
        """Return whether a new network is initialised to compute a linear code (PCA of patches)."""
        return False

    @property
    def kind(self) -> str:
        """Name of the network, for messages."""
        return self.architecture

    @property
    def posterior(self) -> Literal["gaussian", "categorical"] | None:
        """Distribution from which latents are drawn, or None if latents are not random."""
        return None

    @property
    def has_kl(self) -> bool:
        """Whether the network's latent has a KL divergence to a prior."""
        return self.bottleneck.has_kl

    @property
    def kl_channels(self) -> int:
        """Number of channels with a separate KL: the latent channels, or 1 for a KL over tokens."""
        return self.latent_channels

    @property
    def bottleneck(self) -> BottleneckConfig:
        """Options of the bottleneck, which turns encoder features into a latent.

        By default, the bottleneck has no options.
        """
        return BottleneckConfig()

    @property
    def has_codes(self) -> bool:
        """Whether the network is a tokenizer, whose latent consists of discrete codes."""
        return False

    @property
    def pixel_likelihood(self) -> str | None:
        """Likelihood whose parameters the decoder returns. None if the decoder returns images."""
        return None

    @property
    def draws_noise(self) -> bool:
        """Whether training draws random numbers even if the decoder gets the posterior's mode."""
        return False

    @property
    def f(self) -> int:
        """Downsampling factor f. A latent position stands for f x f pixels."""
        raise NotImplementedError  # Each kind of network computes f from its own options.

    def shape(self) -> dict[str, Any]:
        """Return the arguments that build the network.

        Options marked with `OfTheRun` are left out, because they belong to the training run.
        """
        return self.model_dump(exclude=set(marked(type(self), OfTheRun)))


class LevelsConfig(ModelConfig):
    """Options of a network with levels.

    Each level after the first halves the height and width of the maps.
    """

    block_out_channels: Widths = Field(
        default=(128, 256, 512, 512),
        description=(
            "Number of channels of each level of the network, from full resolution down: one "
            "number for each level. Each further level halves the resolution, so the downsampling "
            "factor is 2 ** (number of levels - 1)."
        ),
    )

    @property
    def f(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

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
                f"{len(self.block_out_channels)} levels"
            )


class SingleFile(Pretrained):
    """The option `pretrained_family`, for networks that can be loaded from a single file."""

    pretrained_family: Annotated[SingleFileKind | None, OfTheRun()] = Field(
        default=None,
        description=(
            "Model family (such as sdxl) of an autoencoder that you give as a single .safetensors "
            "file. The family decides the scaling factor of the latents. With the family `other`, "
            "the scaling factor is 1. By default, the program recognises the family if the file "
            "holds a whole diffusion model, and not only the autoencoder."
        ),
    )


def levels_with(kind: str, blocks: Sequence[str]) -> tuple[int, ...]:
    """Return the index of each level whose block name contains `kind`."""
    return tuple(i for i, block in enumerate(blocks) if kind in block)
