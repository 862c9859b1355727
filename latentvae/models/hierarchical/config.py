"""Options of hierarchical VAEs."""

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
            "Blocks of the encoder, from fine to coarse. 32x2 means two blocks on feature maps of "
            "32 x 32 positions. 32d2 means one block on maps of 32 x 32 positions, and then "
            "pooling by 2. The first resolution is usually the side of the images in pixels. If "
            "the first resolution is a smaller divisor of this side, each position reads a "
            "square of pixels, and the network is faster. If the first resolution is a little "
            "larger than the images, black pixels are added at the edges of the images."
        ),
    )
    dec_blocks: str = Field(
        default="1x1,4m1,4x1,8m4,8x2,16m8,16x2,32m16",
        description=(
            "Blocks of the decoder, from coarse to fine. Each block has its own group of latents. "
            "4x2 means two blocks on feature maps of 4 x 4 positions. 4m1 means one block on maps "
            "of 4 x 4 positions, whose input is the map of resolution 1, upsampled to 4 x 4. The "
            "last resolution is usually the side of the images in pixels, or a divisor of this "
            "side."
        ),
    )
    width: Positive = Field(
        default=64, description="Number of channels of the feature maps (see custom_widths)."
    )
    custom_widths: str = Field(
        default="",
        description=(
            "Numbers of channels for some resolutions, in place of `width`. 32:64,16:128 means 64 "
            "channels at resolution 32 and 128 channels at resolution 16. Resolutions without a "
            "number in custom_widths have `width` channels."
        ),
    )
    zdim: Positive = Field(
        default=16, description="Number of latent channels of each group of latents."
    )
    bottleneck_multiple: float = Field(
        default=0.25,
        gt=0.0,
        description=(
            "Number of channels inside a block, as a fraction of `width`. bottleneck_multiple is "
            "for blocks of the style vdvae (see block)."
        ),
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
            "Style of the blocks: `vdvae` (bottleneck blocks without normalisation, as in Very "
            "Deep VAE) or `nvae` (batch norm, depthwise convolutions, squeeze and excitation, as "
            "in NVAE)."
        ),
    )
    activation: ActivationName = Field(
        default="gelu",
        description=(
            "Activation function of blocks of the style vdvae (see block). The paper of Very Deep "
            "VAE uses gelu."
        ),
    )
    posterior: PosteriorName = Field(
        default="full",
        description=(
            "How the network predicts the posterior. With `full`, the network predicts the "
            "posterior itself (as in Very Deep VAE). With `residual`, the network predicts the "
            "difference between posterior and prior (as in NVAE). With `precision`, the network "
            "predicts a Gaussian, and the posterior is the precision-weighted combination of this "
            "Gaussian with the prior (as in Ladder VAE)."
        ),
    )
    std: StdName = Field(
        default="exp",
        description=(
            "Function that converts the network's output to a standard deviation: `exp` or "
            "`softplus`. Efficient-VDVAE (arXiv:2203.13751) uses softplus. The function "
            "`softplus` is scaled so that softplus(0) = 1, as in the paper on Efficient-VDVAE."
        ),
    )
    links: Literal["last", "mirrored"] = Field(
        default="last",
        description=(
            "Which features of the encoder each block of the decoder reads. With `last`, all "
            "decoder blocks of a resolution read the output of the encoder's last block of this "
            "resolution. With `mirrored`, the decoder blocks of a resolution read the outputs of "
            "the encoder blocks of this resolution in reverse order: the first decoder block reads "
            "the last encoder block."
        ),
    )
    no_bias_above: Positive = Field(
        default=64,
        description=(
            "Largest resolution at which the decoder has a learned bias for each position. At "
            "finer resolutions, the decoder has no learned bias for each position."
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
        """Return the arguments of `HierarchicalVAE`, except the shape of the images."""
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
