"""`AsymmetricAutoencoderKL`: Stable Diffusion's encoder with a larger decoder.

For inpainting, the decoder can also take the known part of an image as input (Zhu et al. 2023,
arXiv:2306.04632).

images (B, C, H, W) -> encoder -> moments (B, 2d, H/8, W/8) -> z (B, d, H/8, W/8) -> decoder ->
recon (B, C, H, W)

`B` batch, `C` image channels, `H W` pixels, `d` latent channels. The moments are the mean and the
log-variance of the posterior.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL
from pydantic import Field, model_validator
from torch import Tensor

from latentvae.models.conv.conv_config import ENCODER, ConvolutionalConfig, block_types
from latentvae.models.family import LatentShape, Usage
from latentvae.models.model_config import SingleFile, Widths
from latentvae.models.network import Network
from latentvae.models.posterior import KLTrainingWrapper, PosteriorConfig, PosteriorFamily
from latentvae.option_marks import Positive


class AsymmetricModelConfig(ConvolutionalConfig, SingleFile, PosteriorConfig):
    """Options of the network: diffusers' AsymmetricAutoencoderKL.

    The network has Stable Diffusion's encoder and a decoder of another size. Fine-tuning starts
    from an AsymmetricAutoencoderKL, or from the encoder of an AutoencoderKL.
    """

    architecture: Literal["asymmetric"] = "asymmetric"
    up_block_out_channels: Widths = Field(
        default=(192, 384, 768, 768),
        description=(
            "Number of channels of each decoder level, from full resolution down. The four numbers "
            "must be w, 2 * w, 4 * w and 4 * w, where you choose w."
        ),
    )
    layers_per_up_block: Positive = Field(
        default=3,
        description=(
            "Number of residual blocks per level of the decoder, minus one. The default 3 "
            "gives 4 blocks."
        ),
    )

    @property
    def draws_noise(self) -> bool:
        return True  # training draws random masks

    @model_validator(mode="after")
    def _check_decoder(self) -> "AsymmetricModelConfig":
        w = self.up_block_out_channels[0]
        if self.up_block_out_channels != (w, 2 * w, 4 * w, 4 * w):
            raise ValueError(
                "up_block_out_channels must be w, 2 w, 4 w, 4 w, such as "
                f"{(w, 2 * w, 4 * w, 4 * w)}, because diffusers' decoder can read a known picture "
                f"only at these widths (got {self.up_block_out_channels})"
            )
        if len(self.block_out_channels) != 4:
            raise ValueError(
                "block_out_channels must have 4 levels, as the decoder has (f is 8), not "
                f"{len(self.block_out_channels)}"
            )
        if w % self.norm_num_groups:
            raise ValueError(
                f"norm_num_groups {self.norm_num_groups} does not divide the width {w} of "
                "up_block_out_channels"
            )
        return self


def build_asymmetric_kl(
    *,
    block_out_channels: Sequence[int],
    image_channels: int = 3,
    layers_per_block: int = 2,
    up_block_out_channels: Sequence[int],
    layers_per_up_block: int = 3,
    latent_channels: int = 4,
    norm_num_groups: int = 32,
    sample_size: int = 256,
) -> AsymmetricAutoencoderKL:
    """Return a freshly initialised `AsymmetricAutoencoderKL`.

    Args:
        block_out_channels, layers_per_block: width of each level of the encoder, and number of
            residual blocks per level.
        up_block_out_channels, layers_per_up_block: width of each level of the decoder, and number
            of residual blocks per level minus one. The decoder's widths, from full resolution
            down, must be w, 2 w, 4 w, 4 w for some number w. diffusers' decoder requires these
            widths, because its part that reads the known picture has them. Four levels give the
            downsampling factor 8.
        sample_size: side of the training images in pixels, which is only stored in the config.
    """
    down, up = block_types(len(block_out_channels), ())
    widths: Any = (tuple(block_out_channels), tuple(up_block_out_channels))

    return AsymmetricAutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=down,
        down_block_out_channels=widths[0],
        layers_per_down_block=layers_per_block,
        up_block_types=up,
        up_block_out_channels=widths[1],
        layers_per_up_block=layers_per_up_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        sample_size=sample_size,
    )


class AsymmetricTrainingWrapper(KLTrainingWrapper):
    """Training wrapper that encodes, samples the posterior, and decodes with a random mask.

    About half of the images are decoded from their latents alone. For the other images, the decoder
    also reads the pixels outside a random box, as in inpainting pipelines.
    """

    def decode(self, z: Tensor, images: Tensor) -> Tensor:
        # DDP needs a forward pass that uses every weight. So the decoder always gets the image. A
        # mask of ones hides the whole image.
        return self.net.decode(z, image=images, mask=random_masks(images)).sample


def random_masks(images: Tensor) -> Tensor:
    """Return masks (B, 1, H, W) that are 1 where the decoder does not see the image.

    About half of the masks are 1 everywhere. The other masks are 1 only in a random box. Each side
    of the box is 1/4 to 1 times the side of the image. The random numbers come from torch's global
    generator.
    """
    B, _, H, W = images.shape
    whole, height, width, top, left = torch.rand(5, B, 1, 1, device=images.device)
    height, width = 0.25 + 0.75 * height, 0.25 + 0.75 * width
    y = (torch.arange(H, device=images.device) + 0.5).view(1, H, 1) / H
    x = (torch.arange(W, device=images.device) + 0.5).view(1, 1, W) / W
    top, left = top * (1 - height), left * (1 - width)
    box = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)  # (B, H, W)
    return (box | (whole < 0.5)).to(images.dtype)[:, None]


class AsymmetricFamily(PosteriorFamily):
    """Methods for `AsymmetricAutoencoderKL`. Training can start from `AutoencoderKL`'s encoder."""

    network = AsymmetricAutoencoderKL
    options = AsymmetricModelConfig
    wrapper = AsymmetricTrainingWrapper
    why_no_checkpointing = "does not exist for diffusers' AsymmetricAutoencoderKL"

    def build(self, **options: Any) -> AsymmetricAutoencoderKL:
        return build_asymmetric_kl(**options)

    def options_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "block_out_channels": config["down_block_out_channels"],
            "layers_per_block": config["layers_per_down_block"],
            "up_block_out_channels": config["up_block_out_channels"],
            "layers_per_up_block": config["layers_per_up_block"],
            "latent_channels": config["latent_channels"],
            "norm_num_groups": config["norm_num_groups"],
        }

    def adapt(self, net: Network, options: Mapping[str, Any]) -> Any | None:
        if isinstance(net, AutoencoderKL):
            return _with_larger_decoder(net, options)
        return super().adapt(net, options)

    def latent_shape(self, net: Network) -> LatentShape:
        f = 2 ** (len(net.config["down_block_out_channels"]) - 1)
        return LatentShape(f, net.config["latent_channels"])

    def usage(self, net: Network) -> Usage:
        return Usage(
            pipelines="Stable Diffusion's pipelines take this model as `vae=`. ",
            snippet="""\
z = vae.encode(images).latent_dist.sample()  # images (B, {channels}, H, W){kind} in [-1, 1]
recon = vae.decode(z).sample  # or vae.decode(z, image=x, mask=1 where x is unknown)""",
        )


def _with_larger_decoder(
    net: AutoencoderKL, options: Mapping[str, Any]
) -> AsymmetricAutoencoderKL | None:
    config = net.config
    is_stock = (
        set(config["down_block_types"]) == {"DownEncoderBlock2D"} and config["act_fn"] == "silu"
    )
    if net.quant_conv is None or not is_stock or not config["mid_block_add_attention"]:
        return None  # AsymmetricAutoencoderKL cannot have the encoder of `net`
    own = {name: config[name] for name in ENCODER} | {"image_channels": config["in_channels"]}
    larger = build_asymmetric_kl(**{**options, **own})
    for name in ("encoder", "quant_conv"):
        getattr(larger, name).load_state_dict(getattr(net, name).state_dict())
    larger.register_to_config(scaling_factor=config["scaling_factor"])
    return larger
