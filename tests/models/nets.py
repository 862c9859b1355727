"""Small networks of each kind, with random weights that are always the same."""

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor

from latentvae.models import DiscreteAutoencoder, build_autoencoder_kl
from latentvae.models.conv.kl import build_autoencoder_dc


def kl(**options: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return build_autoencoder_kl(block_out_channels=(32, 64), norm_num_groups=8, **options).eval()


def vq() -> VQModel:
    torch.manual_seed(0)
    network: Any = VQModel  # diffusers types widths as one-element tuples
    return network(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        num_vq_embeddings=64,
    ).eval()


def movq() -> VQModel:
    torch.manual_seed(0)
    network: Any = VQModel
    return network(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        num_vq_embeddings=64,
        norm_type="spatial",
    ).eval()


def discrete() -> DiscreteAutoencoder:
    torch.manual_seed(0)
    quantizer = {"type": "fsq", "levels": [5, 5, 5]}
    shape: dict[str, Any] = {"block_out_channels": (32, 32), "latent_channels": 8}
    return DiscreteAutoencoder(**shape, norm_num_groups=8, quantizer=quantizer).eval()


def dc() -> AutoencoderDC:
    torch.manual_seed(0)
    return build_autoencoder_dc(
        block_out_channels=(32, 32, 64),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        latent_channels=4,
        attention_levels=(2,),
    ).eval()


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    widths: dict[str, Any] = {
        "encoder_block_out_channels": (32, 32),
        "decoder_block_out_channels": (32, 32),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    return AutoencoderTiny(**widths).eval()


NETS = {"kl": kl, "vq": vq, "movq": movq, "discrete": discrete, "dc": dc, "tiny": tiny}


def images(height: int, width: int, *, count: int = 1) -> Tensor:
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))
    return noise * 2 - 1


def largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
