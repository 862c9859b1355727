"""SANA's autoencoder without a posterior: diffusers' `AutoencoderDC`, unchanged.

The paper on this autoencoder is arXiv:2410.10733 (Chen et al., 2024). The downsampling factor f is
usually 32 or more.

images (B, C, H, W) -> encoder -> z (B, d, H/f, W/f) -> decoder -> recon (B, C, H, W)

`B` batch, `C` image channels, `H W` pixels, `d` latent channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from diffusers import AutoencoderDC
from pydantic import Field, model_validator
from torch import Tensor

from latentvae.models.family import LatentShape, Usage
from latentvae.models.model_config import LevelsConfig, levels_with
from latentvae.models.network import Network
from latentvae.models.trainable import TrainableFamily
from latentvae.models.wrapper import TrainingWrapper
from latentvae.option_marks import Count, Positive
from latentvae.outputs import AutoencoderOutput, Latent


class DCModelConfig(LevelsConfig):
    """Options of the network: diffusers' AutoencoderDC, which has no posterior.

    The downsampling factor f is 2 ** (number of levels - 1).
    """

    architecture: Literal["dc"] = "dc"
    encoder_layers_per_block: tuple[Count, ...] = Field(
        default=(2, 2, 2, 3),
        description="Number of blocks in each level of the encoder, from full resolution down.",
    )
    decoder_layers_per_block: tuple[Count, ...] = Field(
        default=(3, 3, 3, 3),
        description="Number of blocks in each level of the decoder, from full resolution down.",
    )
    attention_levels: tuple[Count, ...] = Field(
        default=(),
        description=(
            "Numbers of the levels of the network that have EfficientViT blocks (blocks with "
            "linear attention). Level 0 has the full resolution, and each further level has half "
            "the resolution."
        ),
    )
    attention_head_dim: Positive = Field(
        default=32,
        description=(
            "Number of channels of an attention head. attention_head_dim must divide the number of "
            "channels of each level with attention."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "DCModelConfig":
        self.check_levels("attention_levels", self.attention_levels)
        self.check_length("encoder_layers_per_block", self.encoder_layers_per_block)
        self.check_length("decoder_layers_per_block", self.decoder_layers_per_block)
        for level in self.attention_levels:
            if self.block_out_channels[level] % self.attention_head_dim:
                raise ValueError(
                    f"attention_head_dim {self.attention_head_dim} does not divide the width "
                    f"{self.block_out_channels[level]} of level {level}"
                )
        return self


def build_autoencoder_dc(
    *,
    block_out_channels: Sequence[int],
    image_channels: int = 3,
    encoder_layers_per_block: Sequence[int],
    decoder_layers_per_block: Sequence[int],
    latent_channels: int = 32,
    attention_levels: Sequence[int] = (),
    attention_head_dim: int = 32,
) -> AutoencoderDC:
    """Return a freshly initialised `AutoencoderDC`.

    Args:
        block_out_channels: width of each level, from full resolution down. The downsampling factor
            is 2 ** (number of levels - 1).
        encoder_layers_per_block, decoder_layers_per_block: number of blocks in each level.
        attention_levels: levels (0 = full resolution) with EfficientViT blocks (multi-scale linear
            attention, kernel size 5). The other levels have residual blocks.
        attention_head_dim: width of an attention head, a divisor of the width of each level with
            attention.
    """
    levels = range(len(block_out_channels))
    widths: Any = tuple(block_out_channels)
    blocks: Any = tuple(
        "EfficientViTBlock" if i in attention_levels else "ResBlock" for i in levels
    )
    scales = tuple((5,) if i in attention_levels else () for i in levels)

    return AutoencoderDC(
        in_channels=image_channels,
        latent_channels=latent_channels,
        attention_head_dim=attention_head_dim,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=tuple(encoder_layers_per_block),
        decoder_layers_per_block=tuple(decoder_layers_per_block),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )


class DCTrainingWrapper(TrainingWrapper):
    """Training wrapper that encodes and decodes images, without a posterior."""

    def forward(
        self, images: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> AutoencoderOutput:
        z = self.net.encode(images).latent
        return AutoencoderOutput(
            recon=self.net.decode(z).sample,
            latents=(Latent(z=z.float(), mean=z.float()),),
            output_logvar=self.output_logvar,
        )


class DCFamily(TrainableFamily):
    """Methods for `AutoencoderDC`, whose latents have a mean near zero.

    SANA's pipeline divides these latents by their root mean square and subtracts no mean.
    """

    network = AutoencoderDC
    options = DCModelConfig
    wrapper = DCTrainingWrapper
    has_posterior = False
    scaled_by = "rms"
    why_no_checkpointing = "does not exist for diffusers' AutoencoderDC"

    def build(self, *, sample_size: int = 256, **options: Any) -> AutoencoderDC:
        return build_autoencoder_dc(**options)  # AutoencoderDC has no sample_size

    def options_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        widths, blocks = config["encoder_block_out_channels"], config["encoder_block_types"]
        blocks = [blocks] * len(widths) if isinstance(blocks, str) else blocks
        return {
            "block_out_channels": widths,
            "encoder_layers_per_block": config["encoder_layers_per_block"],
            "decoder_layers_per_block": config["decoder_layers_per_block"],
            "latent_channels": config["latent_channels"],
            "attention_levels": levels_with("EfficientViT", blocks),
            "attention_head_dim": config["attention_head_dim"],
        }

    def latent_shape(self, net: Network) -> LatentShape:
        f = 2 ** (len(net.config["encoder_block_out_channels"]) - 1)
        return LatentShape(f, net.config["latent_channels"])

    def side_multiple(self, net: Network) -> int:
        return self.latent_shape(net).f

    def usage(self, net: Network) -> Usage:
        return Usage(
            pipelines="SANA's pipelines take this model as `vae=`. ",
            snippet="""\
z = vae.encode(images).latent  # images (B, {channels}, H, W){kind} in [-1, 1], f divides H and W
latents = z * vae.config.scaling_factor
recon = vae.decode(z).sample""",
        )
