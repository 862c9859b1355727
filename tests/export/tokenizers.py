"""Tiny tokenizers, one of each quantiser, and their exports."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentvae.export import TokenizerReport, export_tokenizer
from latentvae.latents import latent_statistics
from latentvae.models import DiscreteAutoencoder

CODEBOOK = {"num_codes": 32, "code_channels": 4}
STOCK: dict[str, dict[str, Any]] = {  # what a VQModel can express
    "gradient": {"type": "vq", **CODEBOOK},
    "average": {"type": "vq", "ema_decay": 0.9, **CODEBOOK},
    "sphere": {"type": "vq", "l2_normalize": True, **CODEBOOK},
    "average_sphere": {"type": "vq", "l2_normalize": True, "ema_decay": 0.9, **CODEBOOK},
    "lfq": {"type": "lfq", "num_bits": 10},
    "bsq": {"type": "lfq", "num_bits": 10, "spherical": True},
    "simvq": {"type": "simvq", **CODEBOOK},
}
OTHER: dict[str, dict[str, Any]] = {
    "fsq": {"type": "fsq", "levels": [4, 3, 3]},
    "residual": {"type": "residual", "num_levels": 2, **CODEBOOK},
    "gumbel": {"type": "gumbel", **CODEBOOK},
    "many_bits": {"type": "lfq", "num_bits": 17},
}


def tokenizer(name: str, **options: Any) -> DiscreteAutoencoder:
    """As after training: a learned codebook lies where the features do."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": (8, 8, 8), "layers_per_block": 1}
    shape |= {"latent_channels": 8, "norm_num_groups": 4}
    net = DiscreteAutoencoder(**shape | options, quantizer=(STOCK | OTHER)[name]).eval()
    with torch.no_grad():
        net.decoder.conv_out.weight.mul_(3.0)
        net.quant_conv.weight.mul_(20.0)  # features of a length of their own
        features = net.encode(photos(8)).latents
    vectors = features.movedim(1, 3).flatten(0, 2)
    net.quantize.initialise(vectors, generator=torch.Generator().manual_seed(1))
    return net


def photos(count: int = 2, side: int = 32) -> Tensor:
    """Smooth pictures: noise at a quarter of the side, enlarged."""
    noise = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.interpolate(noise * 2 - 1, size=side, mode="bilinear")


def export(net: DiscreteAutoencoder, out: Path, **options: Any) -> TokenizerReport:
    images = photos()
    statistics = latent_statistics(net, [images])
    return export_tokenizer(net, out, statistics=statistics, resolution=32, probe=images, **options)
