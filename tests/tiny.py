"""One small network of each kind for all tests, with random weights that are always the same.

    net = TINY["kl"]()

A call takes milliseconds, also one with a backward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderRAE,
    AutoencoderTiny,
    VQModel,
)
from torch import Tensor
from torch.nn import functional as F

from latentvae.models import (
    VQVAE2,
    DiscreteAutoencoder,
    ViTAutoencoderKL,
    ViTTokenizer,
    build_autoencoder_kl,
)
from latentvae.models.conv.asymmetric import build_asymmetric_kl
from latentvae.models.dc.dc import build_autoencoder_dc

# Of stock classes, f = 2.
BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
CODEBOOK = {"num_codes": 32, "code_channels": 4}
STOCK: dict[str, dict[str, Any]] = {  # quantisers that a VQModel can express
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
RAE: dict[str, Any] = {
    "encoder_type": "mae",
    "encoder_hidden_size": 64,
    "encoder_patch_size": 8,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "patch_size": 4,
    "encoder_input_size": 32,
    "image_size": 16,
}


def kl(**options: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return build_autoencoder_kl(block_out_channels=(32, 64), norm_num_groups=8, **options).eval()


def asymmetric(**options: Any) -> AsymmetricAutoencoderKL:
    """f = 8, as diffusers' decoder asks."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1}
    shape |= {"up_block_out_channels": (8, 16, 32, 32), "layers_per_up_block": 1}
    return build_asymmetric_kl(**shape | {"norm_num_groups": 4} | options).eval()


def dc() -> AutoencoderDC:
    torch.manual_seed(0)
    return build_autoencoder_dc(
        block_out_channels=(32, 32, 64),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        latent_channels=4,
        attention_levels=(2,),
    ).eval()


def tokenizer(name: str, **options: Any) -> DiscreteAutoencoder:
    """One of `STOCK | OTHER` as after training: a learned codebook lies where the features do."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": (8, 8, 8), "layers_per_block": 1}
    shape |= {"latent_channels": 8, "norm_num_groups": 4}
    net = DiscreteAutoencoder(**shape | options, quantizer=(STOCK | OTHER)[name]).eval()
    with torch.no_grad():
        net.decoder.conv_out.weight.mul_(3.0)
        net.quant_conv.weight.mul_(20.0)  # features of a length of their own
    start_codes(net)
    return net


def start_codes(net: Any) -> None:
    """Put a learned codebook where the features of photos lie."""
    with torch.no_grad():
        features = net.encode(photos(8)).latents
    vectors = features.movedim(1, 3).flatten(0, 2)
    net.quantize.initialise(vectors, generator=torch.Generator().manual_seed(1))


VIT: dict[str, Any] = {  # f = 4
    "patch_size": 4,
    "encoder_channels": 16,
    "encoder_blocks": 1,
    "decoder_channels": 24,
    "decoder_blocks": 2,
    "attention_head_dim": 8,
}


def vit_kl(**options: Any) -> ViTAutoencoderKL:
    torch.manual_seed(0)
    return ViTAutoencoderKL(**VIT | {"latent_channels": 4} | options).eval()


def vit_vq(name: str, **options: Any) -> ViTTokenizer:
    """One of `STOCK | OTHER`, with codes where the features lie."""
    torch.manual_seed(0)
    shape = VIT | {"latent_channels": 16} | options
    net = ViTTokenizer(**shape, quantizer=(STOCK | OTHER)[name]).eval()
    start_codes(net)
    return net


def vqvae2(levels: int = 2, **options: Any) -> VQVAE2:
    """Levels of f = 4 and 2 as after training: each codebook lies where its features do."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": (8,) * levels, "code_levels": levels}
    shape |= {"layers_per_block": 1, "residual_channels": 4, "latent_channels": 8}
    codes = {"type": "vq", "ema_decay": 0.9, **CODEBOOK}
    net = VQVAE2(**shape | {"quantizer": codes} | options).eval()
    with torch.no_grad():
        for part in (*net.quant_conv, *net.condition):
            next(iter(part.parameters())).mul_(10.0)  # features of a length of their own
    for place, quantizer in enumerate(net.quantize):
        with torch.no_grad():
            features = net.quantize_levels(net.encode(photos(8)).latents)[0][place]
        vectors: Any = features.movedim(1, 3).flatten(0, 2)
        own: Any = quantizer
        own.initialise(vectors, generator=torch.Generator().manual_seed(1))
    return net


def stock_vq(**options: Any) -> VQModel:
    torch.manual_seed(0)
    widths: dict[str, Any] = {"block_out_channels": (32, 32), "norm_num_groups": 8}
    network: Any = VQModel  # diffusers types widths as one-element tuples
    return network(**BLOCKS | widths | {"num_vq_embeddings": 64} | options).eval()


def spread_vq(num_codes: int = 300, *, seed: int = 0, image_channels: int = 3) -> VQModel:
    """A stock one whose codes lie where its features do, so that many are used."""
    torch.manual_seed(seed)
    channels = {"in_channels": image_channels, "out_channels": image_channels}
    net = VQModel(**BLOCKS, **channels, latent_channels=3, num_vq_embeddings=num_codes)
    with torch.no_grad():
        net.quantize.embedding.weight.normal_()
    return net.eval()


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    widths: dict[str, Any] = {
        "encoder_block_out_channels": (32, 32),
        "decoder_block_out_channels": (32, 32),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    return AutoencoderTiny(**widths).eval()


def flux2() -> AutoencoderKLFlux2:
    """Its batch norm has statistics of its own."""
    torch.manual_seed(0)
    net = AutoencoderKLFlux2(**BLOCKS, latent_channels=8).eval()
    mean, var = net.bn.running_mean, net.bn.running_var
    assert mean is not None and var is not None
    mean.normal_()
    var.uniform_(0.5, 2)
    return net


def rae() -> AutoencoderRAE:
    """16 x 16 pixels alone."""
    torch.manual_seed(0)
    return AutoencoderRAE(**RAE).eval()


# What can be trained, by family and then by what it is of it.
TRAINABLE: dict[str, dict[str, Callable[..., Any]]] = {
    "kl": {"kl": kl},
    "asymmetric": {"asymmetric": asymmetric},
    "dc": {"dc": dc},
    "vq": {name: partial(tokenizer, name) for name in STOCK | OTHER},
    "vit_kl": {"vit_kl": vit_kl, "vit_kl_conv": partial(vit_kl, decoder_head="conv")},
    "vit_vq": {
        "vit_sphere": partial(vit_vq, "sphere"),
        "vit_fsq": partial(vit_vq, "fsq", decoder_head="conv"),
        "vit_residual": partial(vit_vq, "residual"),
        "vit_gumbel": partial(vit_vq, "gumbel"),
    },
    "vqvae2": {"vqvae2": vqvae2, "three_levels": partial(vqvae2, 3)},
}
FOREIGN: dict[str, Callable[..., Any]] = {
    "stock_vq": stock_vq,
    "movq": partial(stock_vq, norm_type="spatial"),
    "amused": partial(stock_vq, lookup_from_codebook=True),
    "tiny": tiny,
    "flux2": flux2,
    "rae": rae,
}
TINY: dict[str, Callable[..., Any]] = {
    name: build for nets in [*TRAINABLE.values(), FOREIGN] for name, build in nets.items()
}


def images(height: int, width: int, *, count: int = 1) -> Tensor:
    """Noise (count, 3, height, width) in [-1, 1]."""
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))
    return noise * 2 - 1


def photos(count: int = 2, side: int = 32) -> Tensor:
    """Smooth pictures: noise at a quarter of the side, enlarged."""
    noise = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(2))
    return F.interpolate(noise * 2 - 1, size=side, mode="bilinear")


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return (a - b).abs().max().item()
