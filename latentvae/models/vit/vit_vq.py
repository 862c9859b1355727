"""A tokenizer of vision transformers, with any quantiser of `latentvae.bottlenecks`.

This tokenizer follows ViT-VQGAN (arXiv:2110.04627). As in ViT-VQGAN, two layers with a tanh between
them project each token to the few channels of its code. The transformer blocks are not those of
ViT-VQGAN (see `vit.transformer`). Position embeddings are rotary instead of learned, so images may
have any size that is a multiple of the patch size.

images (B, C, H, W) -> encoder -> quant_conv -> features (B, c, H/p, W/p) -> quantize -> z (B, D,
H/p, W/p) and indices -> post_quant_conv -> decoder -> recon (B, C, H, W)

`B` batch, `C` image channels, `c` feature channels, `D` code width, `p` patch size.
"""

from collections.abc import Mapping
from typing import Any, Literal

from diffusers import ModelMixin  # noqa: F401  diffusers' pipelines need it in this module
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import nn

from latentvae.bottlenecks import Quantizer, build_quantizer
from latentvae.models.family import LatentShape
from latentvae.models.network import Network
from latentvae.models.tokenizer import LIKELIHOODS, Tokenizer
from latentvae.models.tokenizer_family import TokenizerConfig, TokenizerFamily
from latentvae.models.vit.networks import Head, ViTDecoder, ViTEncoder
from latentvae.models.vit.vit_config import SHAPE, ViTConfig
from latentvae.option_marks import Positive

# The quantiser of ViT-VQGAN.
_QUANTIZER = {"type": "vq", "num_codes": 8192, "code_channels": 32, "l2_normalize": True}


class ViTVQModelConfig(ViTConfig, TokenizerConfig):
    """Options of the network: a ViT tokenizer with a quantiser of your choice.

    The downsampling factor is `patch_size`.
    """

    architecture: Literal["vit_vq"] = "vit_vq"
    latent_channels: Positive = Field(
        default=768,
        description=(
            "Number of channels between the two layers that project the encoder's output to the "
            "channels of the quantiser."
        ),
    )


class ViTTokenizer(Tokenizer):
    """A ViT autoencoder with a quantiser of this package, in diffusers' file format.

        net = ViTTokenizer.from_pretrained(folder)
        indices = net.tokenize(images).indices
        recon = net.decode_indices(indices).sample

    With the default arguments, the network has the shape of ViT-VQGAN base.

    Args:
        patch_size: side of a patch in pixels. It is also the downsampling factor.
        encoder_channels, decoder_channels: channels of a token.
        encoder_blocks, decoder_blocks: number of transformer blocks.
        attention_head_dim: channels of an attention head, a multiple of 4.
        decoder_head: `"linear"` or `"conv"`, see `ViTDecoder`.
        latent_channels: channels between the two layers of `quant_conv`.
        quantizer: the quantiser's `type` (see `bottlenecks.QUANTIZERS`) and arguments.
        likelihood: None, or "logit_laplace". With "logit_laplace", the decoder returns the
            parameters of this likelihood (2 maps for each image channel) instead of images.
        sample_size: side of the training images in pixels.
        scaling_factor: 1 / std of the features, for diffusion models that train on these features.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012 (diffusers asks for a list)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 8,
        encoder_channels: int = 768,
        encoder_blocks: int = 12,
        decoder_channels: int = 768,
        decoder_blocks: int = 12,
        attention_head_dim: int = 64,
        decoder_head: Head = "linear",
        latent_channels: int = 768,
        quantizer: Mapping[str, Any] = _QUANTIZER,
        likelihood: str | None = None,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        shape: Any = {"patch_size": patch_size, "head_channels": attention_head_dim}
        quantize: Quantizer = build_quantizer(**quantizer)

        # With a likelihood, the decoder has 2 maps for each image channel
        self.likelihood = None if likelihood is None else LIKELIHOODS[likelihood]()
        maps = out_channels * (1 if self.likelihood is None else 2)

        # Parts, in the order in which images pass through them
        self.encoder = ViTEncoder(in_channels, encoder_channels, num_blocks=encoder_blocks, **shape)
        self.quant_conv = nn.Sequential(
            nn.Conv2d(encoder_channels, latent_channels, 1),
            nn.Tanh(),
            nn.Conv2d(latent_channels, quantize.in_channels, 1),
        )
        self.quantize = quantize
        self.post_quant_conv = nn.Conv2d(quantize.code_channels, decoder_channels, 1)
        self.decoder = ViTDecoder(
            maps, decoder_channels, num_blocks=decoder_blocks, head=decoder_head, **shape
        )


class ViTVQFamily(TokenizerFamily):
    """Methods for `ViTTokenizer`, which no class of diffusers can replace."""

    network = ViTTokenizer
    options = ViTVQModelConfig

    def build(self, *, image_channels: int = 3, **options: Any) -> ViTTokenizer:
        return ViTTokenizer(in_channels=image_channels, out_channels=image_channels, **options)

    def options_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: config[name] for name in (*SHAPE, "likelihood", "quantizer")}

    def latent_shape(self, net: Network) -> LatentShape:
        return LatentShape(net.config["patch_size"], self.quantizers(net)[0].in_channels)

    def side_multiple(self, net: Network) -> int:
        return net.config["patch_size"]
