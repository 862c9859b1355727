"""Latent diffusion's autoencoder with continuous latents: diffusers' `AutoencoderKL`, unchanged.

The paper on latent diffusion is arXiv:2112.10752 (Rombach et al., 2022).

images (B, C, H, W) -> encoder -> moments (B, 2d, H/f, W/f) -> z (B, d, H/f, W/f) -> decoder ->
recon (B, C, H, W)

`B` batch, `C` image channels, `H W` pixels, `d` latent channels, `f` downsampling factor. The
moments are the mean and the log-variance of the posterior.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoencoderKL
from pydantic import Field, model_validator

from latentvae.models.conv.conv_config import ENCODER, AttentionConfig, block_types
from latentvae.models.family import LatentShape, Usage
from latentvae.models.model_config import SingleFile, levels_with
from latentvae.models.network import Network
from latentvae.models.posterior import PosteriorConfig, PosteriorFamily
from latentvae.models.trainable import PROFILES
from latentvae.option_marks import Count, OfTheRun


class KLModelConfig(AttentionConfig, SingleFile, PosteriorConfig):
    """Options of the network: diffusers' AutoencoderKL.

    The downsampling factor f is 2 ** (number of levels - 1).
    """

    architecture: Literal["kl"] = "kl"
    use_quant_conv: bool = Field(
        default=True,
        description=(
            "Add a 1x1 convolution before the latent and another one after the latent. Stable "
            "Diffusion has 1x1 convolutions around the latent, but SD3 and FLUX do not."
        ),
    )
    initial_posterior_logvar: float = Field(
        default=0.0,
        description=(
            "Log-variance of the posterior at the start of training. With a value below 0, samples "
            "of the posterior have less noise in the first updates, so the decoder learns sooner."
        ),
    )

    lora_rank: Annotated[Count, OfTheRun()] = Field(
        default=0,
        description=(
            "Rank of the adapters (LoRA) that fine-tuning trains in place of the decoder's "
            "weights. All weights except the adapters are frozen. In the exported model, the "
            "adapters are merged into the weights. The exported folder also has a folder `lora` "
            "with the adapters alone, in the format of the library PEFT. With lora_rank 0, "
            "fine-tuning trains the decoder's weights, without adapters."
        ),
    )

    @model_validator(mode="after")
    def _check_rank(self) -> "KLModelConfig":
        if self.lora_rank and self.pretrained_model_name_or_path is None:
            raise ValueError(
                f"lora_rank {self.lora_rank} needs pretrained_model_name_or_path, because adapters "
                "only fine-tune a pretrained network."
            )
        if self.lora_rank and not self.freeze_encoder:
            raise ValueError(
                f"lora_rank {self.lora_rank} trains adapters of the decoder only. Give "
                "--freeze_encoder too."
            )
        return self

    @model_validator(mode="after")
    def _check_variance(self) -> "KLModelConfig":
        if self.posterior_logvar is not None and self.initial_posterior_logvar != 0:
            raise ValueError(
                f"initial_posterior_logvar {self.initial_posterior_logvar:g} has no effect with "
                f"posterior_logvar {self.posterior_logvar:g}, which fixes the log-variance. Give "
                "--initial_posterior_logvar 0."
            )
        return self


def build_autoencoder_kl(
    *,
    block_out_channels: Sequence[int],
    image_channels: int = 3,
    layers_per_block: int = 2,
    latent_channels: int = 4,
    norm_num_groups: int = 32,
    attention_levels: Sequence[int] = (),
    mid_block_add_attention: bool = True,
    use_quant_conv: bool = True,
    initial_posterior_logvar: float = 0.0,
    sample_size: int = 256,
) -> AutoencoderKL:
    """Return a freshly initialised `AutoencoderKL`.

    Args:
        block_out_channels: width of each level, from full resolution down. The downsampling factor
            is 2 ** (number of levels - 1).
        image_channels: number of image channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        attention_levels: levels (0 = full resolution) whose residual blocks are followed by
            self-attention.
        use_quant_conv: add 1x1 convolutions before and after the latent. Stable Diffusion has such
            convolutions, but SD3 and FLUX have none.
        initial_posterior_logvar: value added to the bias of the log-variance. At 0, the posterior
            starts with about the variance of the prior, so the decoder first sees mostly noise.
        sample_size: side of the training images in pixels, which diffusers uses as the tile size.
    """
    widths: Any = tuple(block_out_channels)  # diffusers' type hints ask for one-element tuples
    down, up = block_types(len(widths), attention_levels)

    net = AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        mid_block_add_attention=mid_block_add_attention,
        use_quant_conv=use_quant_conv,
        use_post_quant_conv=use_quant_conv,
        sample_size=sample_size,
    )

    last: Any = net.quant_conv if use_quant_conv else net.encoder.conv_out
    with torch.no_grad():
        last.bias[latent_channels:] += initial_posterior_logvar
    return net


def downsampling_factor(net: Network) -> int:
    """Return the downsampling factor f. A latent position stands for f x f pixels."""
    return 2 ** (len(net.config["block_out_channels"]) - 1)


class KLFamily(PosteriorFamily):
    """Methods for `AutoencoderKL`, the autoencoder class of Stable Diffusion's pipelines."""

    network = AutoencoderKL
    options = KLModelConfig
    profiles = PROFILES

    def build(self, **options: Any) -> AutoencoderKL:
        return build_autoencoder_kl(**options)

    def options_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        names = (*ENCODER, "mid_block_add_attention", "use_quant_conv")
        return {name: config[name] for name in names} | {
            "attention_levels": levels_with("Attn", config["down_block_types"])
        }

    def latent_shape(self, net: Network) -> LatentShape:
        return LatentShape(downsampling_factor(net), net.config["latent_channels"])

    def usage(self, net: Network) -> Usage:
        return Usage(
            pipelines="Any diffusers pipeline takes this model as `vae=`. ",
            snippet="""\
z = vae.encode(images).latent_dist.sample()  # images (B, {channels}, H, W){kind} in [-1, 1]
latents = {latents}
recon = vae.decode(z).sample""",
        )

    def original_options(self, net: Network) -> dict[str, Any]:
        return {"double_z": True}
