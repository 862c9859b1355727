"""Options of hierarchical VAEs, as a section of a preset."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from latentvae.errors import UserError
from latentvae.models.hierarchical.blocks import ActivationName
from latentvae.models.hierarchical.gaussian import PosteriorName, StdName
from latentvae.models.hierarchical.layers import check_blocks
from latentvae.models.hierarchical.network import HierarchicalVAE
from latentvae.models.hierarchical.styles import StyleName
from latentvae.models.vae_config import VAEConfig
from latentvae.option_marks import Positive


class HierarchicalConfig(VAEConfig):
    """Options of the network: a hierarchical VAE with groups of latents at every resolution."""

    can_checkpoint: ClassVar[bool] = True

    architecture: Literal["hierarchical"] = "hierarchical"  # type: ignore[assignment]
    enc_blocks: str = Field(
        default="32x2,32d2,16x2,16d2,8x2,8d2,4x2,4d4,1x1",
        description=(
            "Blocks of the encoder, from fine to coarse. 32x2 means two blocks on maps of 32 x 32 "
            "positions. 32d2 means one block on maps of 32 x 32 positions, and then pooling by 2. "
            "The first resolution is the side of the images in pixels, or divides this side. If it "
            "is smaller than the side, each position reads a square of pixels, which is faster. If "
            "the first resolution is a little larger than the images, black pixels are added at "
            "their edges."
        ),
    )
    dec_blocks: str = Field(
        default="1x1,4m1,4x1,8m4,8x2,16m8,16x2,32m16",
        description=(
            "Blocks of the decoder, from coarse to fine. Each block has a group of latents. 4x2 "
            "means two blocks on maps of 4 x 4 positions. 4m1 means one block on maps of 4 x 4 "
            "positions, which reads the upsampled maps of resolution 1. The last resolution is the "
            "side of the images in pixels, or divides this side."
        ),
    )
    width: Positive = Field(
        default=64, description="Number of channels of the feature maps (see custom_widths)."
    )
    custom_widths: str = Field(
        default="",
        description=(
            "Other numbers of channels for some resolutions. 32:64,16:128 means 64 channels at "
            "resolution 32 and 128 channels at resolution 16. All other resolutions have `width` "
            "channels."
        ),
    )
    zdim: Positive = Field(
        default=16, description="Number of latent channels of each group of latents."
    )
    bottleneck_multiple: float = Field(
        default=0.25,
        gt=0.0,
        description="Number of channels inside a block of the style vdvae, as a share of `width`.",
    )
    num_mixtures: Positive = Field(
        default=10,
        description=(
            "Number of mixture components of each pixel, for the likelihood `logistic_mixture`."
        ),
    )
    block: StyleName = Field(
        default="vdvae",
        description=(
            "Style of the blocks: `vdvae` (bottlenecks without normalisation) or `nvae` (batch "
            "norm, depthwise convolutions, squeeze and excitation)."
        ),
    )
    activation: ActivationName = Field(
        default="gelu",
        description=(
            "Activation function of blocks of the style vdvae (see block). Very Deep VAE has gelu."
        ),
    )
    posterior: PosteriorName = Field(
        default="full",
        description=(
            "What the network predicts of the posterior. `full` predicts the posterior itself "
            "(Very Deep VAE). `residual` predicts its difference from the prior (NVAE). "
            "`precision` predicts a Gaussian that is merged with the prior, weighted by precision "
            "(Ladder VAE)."
        ),
    )
    std: StdName = Field(
        default="exp",
        description=(
            "Function that makes a standard deviation from the network's output: `exp`, or "
            "`softplus`. As in Efficient-VDVAE (arXiv:2203.13751), softplus is scaled so that "
            "softplus(0) = 1."
        ),
    )
    links: Literal["last", "mirrored"] = Field(
        default="last",
        description=(
            "Which features of the encoder the blocks of the decoder read. With `last`, all blocks "
            "of a resolution read the encoder's last block of this resolution. With `mirrored`, "
            "they read the encoder's blocks of this resolution in reverse order."
        ),
    )
    no_bias_above: Positive = Field(
        default=64,
        description=(
            "Largest resolution of the decoder that has a learned bias for each position. Finer "
            "resolutions have no such bias."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "HierarchicalConfig":
        check_blocks(self.enc_blocks, self.dec_blocks, self.custom_widths)
        return self

    @property
    def has_batch_norm(self) -> bool:
        return self.block == "nvae"

    def why_no_single_gaussian(self) -> str:
        return "architecture dense or conv"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `HierarchicalVAE`, without the shape of the images."""
        return self.model_dump(exclude={"architecture"})

    def build(self, image_shape: tuple[int, int, int]) -> HierarchicalVAE:
        channels, height, width = image_shape
        _check_square(height, width)
        return HierarchicalVAE(image_channels=channels, sample_size=height, **self.arguments())


def _check_square(height: int, width: int) -> None:
    if height != width:
        raise UserError(
            f"A hierarchical VAE needs square images (got {height} x {width}). Crop the images."
        )
