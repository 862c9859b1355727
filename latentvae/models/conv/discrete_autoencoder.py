"""An autoencoder with discrete latents: VQGAN with any quantiser of `latentvae.bottlenecks`.

The paper on VQGAN is arXiv:2012.09841 (Esser et al., 2020).

images (B, C, H, W) -> encoder -> quant_conv -> features (B, c, H/f, W/f) -> quantize -> z (B, D,
H/f, W/f) and indices -> post_quant_conv -> decoder -> recon (B, C, H, W)

The modules have the same names as in diffusers' `VQModel`. `conv.stock_vq` converts a `VQModel` to
a `DiscreteAutoencoder` and back.

`B` batch, `C` image channels, `c` feature channels, `D` code width, `f` downsampling factor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ModelMixin  # noqa: F401  diffusers' pipelines need it in this module
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from latentvae.bottlenecks import Quantizer, build_quantizer
from latentvae.errors import UserError
from latentvae.models.conv.conv_config import block_types
from latentvae.models.tokenizer import LIKELIHOODS, Tokenizer

# This quantiser and the default widths of `DiscreteAutoencoder` are from taming-transformers'
# configs/imagenet_vqgan.yaml.
_QUANTIZER = {"type": "vq", "num_codes": 1024, "code_channels": 256}


class DiscreteAutoencoder(Tokenizer):
    """VQGAN with a quantiser of this package, and with diffusers' methods and file format.

        net = DiscreteAutoencoder.from_pretrained(folder)
        indices = net.tokenize(images).indices
        recon = net.decode_indices(indices).sample

    Args:
        block_out_channels: width of each level, from full resolution down. The downsampling factor
            is 2 ** (number of levels - 1).
        latent_channels: number of channels between the encoder and `quant_conv`.
        attention_levels: levels (0 = full resolution) with self-attention.
        quantizer: the quantiser's `type` (see `bottlenecks.QUANTIZERS`) and arguments.
        likelihood: None, or "logit_laplace". With "logit_laplace", the decoder returns the
            parameters of this likelihood (2 maps for each image channel) instead of images.
        sample_size: side of the training images in pixels.
        scaling_factor: 1 / std of the features, for diffusion models that train on these features.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        latent_channels: int = 256,
        norm_num_groups: int = 32,
        attention_levels: Sequence[int] = (),
        mid_block_add_attention: bool = True,
        quantizer: Mapping[str, Any] = _QUANTIZER,
        likelihood: str | None = None,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()

        # Shapes
        down, up = block_types(len(block_out_channels), attention_levels)
        shape: Any = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        quantize: Quantizer = build_quantizer(**quantizer)

        # With a likelihood, the decoder has 2 maps for each image channel
        self.likelihood = None if likelihood is None else LIKELIHOODS[likelihood]()
        maps = out_channels * (1 if self.likelihood is None else 2)

        # Parts, in the order in which images pass through them
        self.encoder = Encoder(
            in_channels, latent_channels, down_block_types=down, double_z=False, **shape
        )
        self.quant_conv = nn.Conv2d(latent_channels, quantize.in_channels, 1)
        self.quantize = quantize
        self.post_quant_conv = nn.Conv2d(quantize.code_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, maps, up_block_types=up, **shape)

    def encode(self, images: Tensor, return_dict: bool = True) -> Any:
        height, width = images.shape[2:]
        if min(height, width) < (f := 2 ** (len(self.config["block_out_channels"]) - 1)):
            raise UserError(
                f"images of {height} x {width} pixels are smaller than the downsampling factor {f}"
            )
        return super().encode(images, return_dict)
