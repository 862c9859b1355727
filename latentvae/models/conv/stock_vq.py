"""Use and convert diffusers' tokenizer `VQModel`, the class of MoVQ and aMUSEd.

This module converts a `VQModel` to a `DiscreteAutoencoder` and back. The submodules of a `VQModel`
and of a `DiscreteAutoencoder` have the same names.

`B` batch, `h w` latent positions, `D` code width.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor
from torch.nn import functional as F

from latentvae.bottlenecks import build_quantizer
from latentvae.models.conv.conv_config import block_types
from latentvae.models.conv.discrete_autoencoder import DiscreteAutoencoder
from latentvae.models.family import Codes, Family, LatentShape, Usage
from latentvae.models.model_config import levels_with
from latentvae.models.network import Computation, Network

# Options that `VQModel`, `DiscreteAutoencoder` and diffusers' `AutoencoderKL` have.
SHARED = (
    "in_channels out_channels block_out_channels layers_per_block latent_channels norm_num_groups "
    "mid_block_add_attention sample_size"
).split()


class StockVQFamily(Family):
    """Methods for `VQModel`, whose quantiser chooses the nearest code from a list of codes.

    The `VQModel` of aMUSEd looks codes up by index (`lookup_from_codebook`). The pixels of aMUSEd's
    `VQModel` are in [0, 1], because aMUSEd's pipeline does not convert images to [-1, 1]
    (diffusers, pipeline_amused_img2img.py).
    """

    has_posterior = False

    def takes_unit_range(self, net: Network) -> bool:
        return bool(net.config.get("lookup_from_codebook"))

    def latent_shape(self, net: Network) -> LatentShape:
        f = 2 ** (len(net.config["block_out_channels"]) - 1)
        return LatentShape(f, _code_channels(net))

    def codes(self, net: Network) -> Codes:
        number = net.config["num_vq_embeddings"]
        return Codes("vq", number, levels=1, codebooks=1, channels=_code_channels(net))

    @torch.no_grad()
    def tokenize(self, net: Network, z: Tensor) -> Tensor:
        module: Any = net
        _, _, (_, _, indices) = module.quantize(z)
        return indices.reshape(len(z), *z.shape[2:])

    @torch.no_grad()
    def decode_indices(
        self, net: Network, indices: Tensor, *, computation: Computation | None = None
    ) -> Tensor:
        return self.decode(net, _codes_of(net, indices), computation=computation)

    @torch.no_grad()
    def decode_without_search(self, net: Network, indices: Tensor) -> Tensor:
        module: Any = net
        if not net.config["lookup_from_codebook"]:
            return module.decode(_codes_of(net, indices), force_not_quantize=True).sample
        # Pass indices and a shape, as aMUSEd's pipelines do.
        shape = (*indices.shape, net.config["latent_channels"])
        sample = module.decode(indices, force_not_quantize=True, shape=shape).sample
        return self.from_own_range(net, sample)

    def usage(self, net: Network) -> Usage:
        return _AMUSED if net.config["lookup_from_codebook"] else _PLAIN

    def original_options(self, net: Network) -> dict[str, Any]:
        return {"double_z": False, "n_embed": net.config["num_vq_embeddings"]}


_PLAIN = Usage(
    pipelines="LDMPipeline takes this model as `vqvae=`. ",
    snippet="""\
features = vae.encode(images).latents  # images (B, {channels}, H, W){kind} in [-1, 1]
z, _, (_, _, indices) = vae.quantize(features)  # row by row from the top left
recon = vae.decode(z, force_not_quantize=True).sample""",
)
_AMUSED = Usage(
    pipelines="aMUSEd's pipelines (such as AmusedPipeline) take this model as `vqvae=`. ",
    snippet="""\
features = vae.encode(images).latents  # images (B, {channels}, H, W){kind} in [0, 1]
indices = vae.quantize(features)[2][2].view(len(features), *features.shape[2:])
shape = (*indices.shape, vae.config.latent_channels)
recon = vae.decode(indices, force_not_quantize=True, shape=shape).sample  # in [0, 1]""",
)


def _code_channels(net: Network) -> int:
    return net.config["vq_embed_dim"] or net.config["latent_channels"]


def _codes_of(net: Any, indices: Tensor) -> Tensor:
    """Look up the codes of indices (B, h, w), as a tensor (B, D, h, w) of codes of width D.

    If `VQModel` quantises these codes again, they do not change, except by rounding.
    """
    codes = net.quantize.get_codebook_entry(indices.flatten(), None)  # (B * h * w, D)
    return codes.view(*indices.shape, -1).permute(0, 3, 1, 2).contiguous()


def attention_levels(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the levels that have attention, read from the config of a diffusers network.

    Returns:
        The levels (0 = full resolution). None if `DiscreteAutoencoder` does not support the
        network's blocks: the blocks have other types, the activation is not SiLU, or encoder and
        decoder have attention at different levels.
    """
    levels = levels_with("Attn", config["down_block_types"])
    blocks = (tuple(config["down_block_types"]), tuple(config["up_block_types"]))
    same = blocks == block_types(len(config["block_out_channels"]), levels)
    return levels if same and config["act_fn"] == "silu" else None


def from_vq_model(net: Any) -> DiscreteAutoencoder | None:
    """Convert diffusers' `VQModel` to a `DiscreteAutoencoder`, with this package's quantiser.

    Weights, codes and indices do not change. If all codes have length 1, as in exports of
    l2-normalised quantisers, further training keeps this length.

    Returns:
        The converted network. None if `DiscreteAutoencoder` does not support the blocks of `net`
        (other types of blocks, spatial norms, an activation other than SiLU, attention at different
        levels of encoder and decoder), or if the pixels of `net` are in [0, 1] (aMUSEd).
    """
    config = net.config

    # Networks that `DiscreteAutoencoder` cannot represent
    attention = attention_levels(config)
    if attention is None or config["norm_type"] != "group" or config["lookup_from_codebook"]:
        return None

    # The same network with our quantiser
    lengths = net.quantize.embedding.weight.detach().float().norm(dim=1)
    ours = DiscreteAutoencoder(
        **{name: config[name] for name in (*SHARED, "scaling_factor")},
        attention_levels=attention,
        quantizer={
            "type": "vq",
            "num_codes": config["num_vq_embeddings"],
            "code_channels": config["vq_embed_dim"] or config["latent_channels"],
            "l2_normalize": bool(torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4)),
        },
    )

    # The weights
    weights = net.state_dict()
    weights["quantize.weight"] = weights.pop("quantize.embedding.weight")
    problems = ours.load_state_dict(weights, strict=False)
    assert problems == (["quantize.usage"], []), problems
    return ours


def why_no_vq_model(quantizer: Mapping[str, Any], likelihood: str | None) -> str:
    """Return a clause that says why no `VQModel` of diffusers can give the same codes, or "".

    Args:
        quantizer, likelihood: arguments with which the `DiscreteAutoencoder` was built.
    """
    if likelihood is not None:
        return f"the decoder returns parameters of a {likelihood} likelihood instead of images"
    with torch.device("meta"):  # only the options matter, so no weights are created
        return build_quantizer(**quantizer).why_not_listed()


@torch.no_grad()
def to_vq_model(net: DiscreteAutoencoder, *, unit_range: bool = False) -> VQModel:
    """Convert a tokenizer to a `VQModel` of diffusers that returns the same indices.

    `why_no_vq_model` must return "" for the tokenizer. A `VQModel` chooses the code with the
    smallest Euclidean distance. If all codes have the norm 1, the code with the smallest distance
    also has the largest cosine similarity, for features of any norm. So the `VQModel` of an
    l2-normalised quantiser does not have to normalise features.

    Args:
        net: the tokenizer, in float32 on the CPU.
        unit_range: use pixels in [0, 1] for input and output, and look codes up by index, as aMUSEd
            does. With pixels in [0, 1], zero padding in the first convolution means black, but it
            meant grey in training. Zeros are appended to codes up to the width `latent_channels`,
            which aMUSEd's pipelines expect.
    """
    assert not why_no_vq_model(net.config["quantizer"], net.config["likelihood"])
    weights = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("quantize.")}
    codebook = weights["quantize.embedding.weight"] = net.quantize.listed_codes()
    config = {name: net.config[name] for name in SHARED}

    if unit_range:
        _fold_unit_range(weights)
        config["latent_channels"] = _make_as_wide(weights)
        codebook = weights["quantize.embedding.weight"]

    down, up = block_types(len(config["block_out_channels"]), net.config["attention_levels"])
    network: Any = VQModel  # diffusers' type hints ask for widths in one-element tuples
    with torch.device("meta"):
        stock = network(
            **config | {"block_out_channels": tuple(config["block_out_channels"])},
            down_block_types=down,
            up_block_types=up,
            num_vq_embeddings=len(codebook),
            vq_embed_dim=codebook.shape[1],
            lookup_from_codebook=unit_range,
        )
    stock.load_state_dict(weights, assign=True)
    return stock.eval()


@torch.no_grad()
def scale_features(net: Any, stock: Any, images: Tensor) -> float:
    """Scale the features of `stock` in place to about the length of its codes.

    If the features are much longer than the codes, float32 distances lose the digits that
    distinguish codes. Scaling by a power of two causes no rounding. Scaled features have the same
    nearest code only if all codes have the same length. If the codes differ in length, the features
    are not scaled.

    Args:
        net: the trained network.
        stock: the same network as a `VQModel`.
        images: (B, C, H, W) in [-1, 1], to measure the length of the features.

    Returns:
        The factor on the features, a power of two, or 1 if the features are not scaled.
    """
    lengths = stock.quantize.embedding.weight.norm(dim=1)
    if not torch.allclose(lengths, lengths[:1], rtol=1e-4):
        return 1.0

    features = net.encode(images).latents
    length = features.norm(dim=1).mean().clamp(min=1e-6)  # not 0, even if all features are 0
    factor = 2.0 ** round(math.log2(lengths[0] / length))
    for parameter in stock.quant_conv.parameters():
        parameter.mul_(factor)
    return factor


def _fold_unit_range(weights: dict[str, Tensor]) -> None:
    """Change the first and the last layer so that the network takes and returns pixels in [0, 1].

    The map 2 x - 1 is folded into the first layer, and (y + 1) / 2 into the last layer.
    """
    first = weights["encoder.conv_in.weight"]
    weights["encoder.conv_in.bias"] -= first.sum(dim=(1, 2, 3))
    first *= 2
    weights["decoder.conv_out.weight"] /= 2
    weights["decoder.conv_out.bias"] += 1
    weights["decoder.conv_out.bias"] /= 2


def _make_as_wide(weights: dict[str, Tensor]) -> int:
    """Pad features and codes with zeros to the same width, and return this width."""
    width = max(weights["quant_conv.weight"].shape[:2])
    for name in ("encoder.conv_out", "quant_conv", "post_quant_conv"):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        inputs = width if name != "encoder.conv_out" else weight.shape[1]
        more = (0, 0, 0, 0, 0, inputs - weight.shape[1], 0, width - weight.shape[0])
        weights[f"{name}.weight"] = F.pad(weight, more)
        weights[f"{name}.bias"] = F.pad(bias, (0, width - len(bias)))
    for name in ("quantize.embedding.weight", "decoder.conv_in.weight"):
        weight = weights[name]
        more = (0, 0) * (weight.ndim - 2) + (0, width - weight.shape[1])
        weights[name] = F.pad(weight, more)
    return width
