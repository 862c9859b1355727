"""An autoencoder of vision transformers, with continuous latents and a Gaussian posterior.

The encoder and decoder follow ViTok (arXiv:2501.09755, and ViTok-v2, arXiv:2605.05331). The
Gaussian posterior is that of latent diffusion (arXiv:2112.10752). The methods and outputs are those
of diffusers' `AutoencoderKL`.

images (B, C, H, W) -> encoder -> quant_conv -> moments (B, 2d, H/p, W/p) -> z (B, d, H/p, W/p) ->
post_quant_conv -> decoder -> recon (B, C, H, W)

`B` batch, `C` image channels, `d` latent channels, `p` patch size. The moments are the mean and the
log-variance of the posterior.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from torch import Tensor, nn

from latentvae.models.family import LatentShape, Usage
from latentvae.models.network import Network
from latentvae.models.posterior import PosteriorConfig, PosteriorFamily
from latentvae.models.vit.networks import Head, ViTDecoder, ViTEncoder
from latentvae.models.vit.vit_config import SHAPE, ViTConfig


class ViTKLModelConfig(ViTConfig, PosteriorConfig):
    """Options of the network: a ViT autoencoder with a Gaussian posterior.

    The downsampling factor is `patch_size`.
    """

    architecture: Literal["vit_kl"] = "vit_kl"


class ViTAutoencoderKL(ModelMixin, ConfigMixin):
    """A ViT autoencoder with the methods and outputs of diffusers' `AutoencoderKL`.

        net = ViTAutoencoderKL.from_pretrained(folder)
        z = net.encode(images).latent_dist.sample()
        recon = net.decode(z).sample

    Args:
        patch_size: side of a patch in pixels. It is also the downsampling factor.
        encoder_channels, decoder_channels: channels of a token.
        encoder_blocks, decoder_blocks: number of transformer blocks.
        attention_head_dim: channels of an attention head, a multiple of 4.
        decoder_head: `"linear"` or `"conv"`, see `ViTDecoder`.
        latent_channels: number of latent channels.
        sample_size: side of the training images in pixels.
        scaling_factor: 1 / std of the latents, for diffusion models that train on these latents.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (diffusers asks for a list)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 16,
        encoder_channels: int = 768,
        encoder_blocks: int = 12,
        decoder_channels: int = 768,
        decoder_blocks: int = 12,
        attention_head_dim: int = 64,
        decoder_head: Head = "linear",
        latent_channels: int = 16,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        shape: Any = {"patch_size": patch_size, "head_channels": attention_head_dim}
        self.encoder = ViTEncoder(in_channels, encoder_channels, num_blocks=encoder_blocks, **shape)
        self.quant_conv = nn.Conv2d(encoder_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, decoder_channels, 1)
        self.decoder = ViTDecoder(
            out_channels, decoder_channels, num_blocks=decoder_blocks, head=decoder_head, **shape
        )

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode images (B, C, H, W) to the posterior of z (B, d, H/p, W/p), for patch size p."""
        posterior = DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decode latents (B, d, h, w) to images (B, C, p h, p w), for patch size p."""
        sample = self.decoder(self.post_quant_conv(z))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Encode and decode images. The decoder gets the posterior's mode.

        With `sample_posterior`, the decoder gets a sample of the posterior instead of the mode.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)


class ViTKLFamily(PosteriorFamily):
    """Methods for `ViTAutoencoderKL`, which no class of diffusers can replace."""

    network = ViTAutoencoderKL
    options = ViTKLModelConfig

    def build(self, *, image_channels: int = 3, **options: Any) -> ViTAutoencoderKL:
        return ViTAutoencoderKL(in_channels=image_channels, out_channels=image_channels, **options)

    def options_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: config[name] for name in SHAPE}

    def latent_shape(self, net: Network) -> LatentShape:
        return LatentShape(net.config["patch_size"], net.config["latent_channels"])

    def side_multiple(self, net: Network) -> int:
        return net.config["patch_size"]

    def why_not_stock(self, options: Mapping[str, Any]) -> str:
        return "diffusers has no class for a ViTAutoencoderKL"

    def usage(self, net: Network) -> Usage:
        return Usage(
            package="latentvae.models",
            snippet="""\
z = vae.encode(images).latent_dist.sample()  # images (B, {channels}, H, W){kind} in [-1, 1]
latents = {latents}
recon = vae.decode(z).sample""",
        )
