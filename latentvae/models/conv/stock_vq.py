"""The tokenizer that diffusers has: `VQModel`, MoVQ and aMUSEd's among them. Conversions between it
and `DiscreteAutoencoder`, whose parts have the same names.

`B` batch, `h w` latent positions, `K` codes, `D` code width.
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
from latentvae.models.conv.tokenizer import DiscreteAutoencoder
from latentvae.models.family import Codes, Family, LatentShape, Usage
from latentvae.models.network import Computation, Network

# Options that both classes have.
_SHARED = (
    "in_channels out_channels block_out_channels layers_per_block latent_channels norm_num_groups "
    "mid_block_add_attention sample_size"
).split()


class StockVQFamily(Family):
    """`VQModel`: codes in a list, of which the nearest is taken.

    aMUSEd's is the one that looks codes up by index (`lookup_from_codebook`); its pixels are in
    [0, 1], for its pipeline does not normalise images (diffusers, pipeline_amused_img2img.py).
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
        # Indices and a shape, as aMUSEd's pipelines give them.
        shape = (*indices.shape, net.config["latent_channels"])
        sample = module.decode(indices, force_not_quantize=True, shape=shape).sample
        return self.from_own_range(net, sample)

    def usage(self, net: Network) -> Usage:
        return _AMUSED if net.config["lookup_from_codebook"] else _PLAIN

    def original_options(self, net: Network) -> dict[str, Any]:
        return {"double_z": False, "n_embed": net.config["num_vq_embeddings"]}


_PLAIN = Usage(
    pipelines="LDMPipeline takes it as `vqvae=`. ",
    snippet="""\
features = vae.encode(images).latents  # images (B, {channels}, H, W){kind} in [-1, 1]
z, _, (_, _, indices) = vae.quantize(features)  # row by row from the top left
recon = vae.decode(z, force_not_quantize=True).sample""",
)
_AMUSED = Usage(
    pipelines="aMUSEd's pipelines (AmusedPipeline and its kin) take it as `vqvae=`. ",
    snippet="""\
features = vae.encode(images).latents  # images (B, {channels}, H, W){kind} in [0, 1]
indices = vae.quantize(features)[2][2].view(len(features), *features.shape[2:])
shape = (*indices.shape, vae.config.latent_channels)
recon = vae.decode(indices, force_not_quantize=True, shape=shape).sample  # in [0, 1]""",
)


def _code_channels(net: Network) -> int:
    return net.config["vq_embed_dim"] or net.config["latent_channels"]


def _codes_of(net: Any, indices: Tensor) -> Tensor:
    """The codes (B, D, h, w) of indices (B, h, w); `decode` takes them: each is its own nearest."""
    codes = net.quantize.get_codebook_entry(indices.flatten(), None)  # (B * h * w, D)
    return codes.view(*indices.shape, -1).permute(0, 3, 1, 2).contiguous()


def from_vq_model(net: Any) -> DiscreteAutoencoder | None:
    """A stock `VQModel` as the same network with this package's quantiser: same weights, codes and
    indices, its own commitment and codebook terms. None where its blocks (spatial norms, another
    activation, attention at other levels of the decoder than of the encoder) or its pixels
    (aMUSEd's) are others.

    Codes of length 1, as exports of l2-normalised quantisers have, stay on the unit sphere.
    """
    config = net.config
    if (config["norm_type"], config["act_fn"]) != ("group", "silu"):
        return None
    if config["lookup_from_codebook"]:
        return None
    attention = [i for i, block in enumerate(config["down_block_types"]) if "Attn" in block]
    blocks = (tuple(config["down_block_types"]), tuple(config["up_block_types"]))
    if blocks != block_types(len(config["block_out_channels"]), attention):
        return None
    lengths = net.quantize.embedding.weight.detach().float().norm(dim=1)
    ours = DiscreteAutoencoder(
        **{name: config[name] for name in (*_SHARED, "scaling_factor")},
        attention_levels=attention,
        quantizer={
            "type": "vq",
            "num_codes": config["num_vq_embeddings"],
            "code_channels": config["vq_embed_dim"] or config["latent_channels"],
            "l2_normalize": bool(torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4)),
        },
    )
    weights = net.state_dict()
    weights["quantize.weight"] = weights.pop("quantize.embedding.weight")
    problems = ours.load_state_dict(weights, strict=False)
    assert problems == (["quantize.usage"], []), problems
    return ours


def why_no_vq_model(quantizer: Mapping[str, Any], likelihood: str | None) -> str:
    """Why a stock `VQModel` cannot be the same tokenizer, as a clause; empty if it can.

    Args:
        quantizer, likelihood: as `DiscreteAutoencoder` takes them.
    """
    if likelihood is not None:
        return f"its decoder gives the parameters of a {likelihood} likelihood"
    with torch.device("meta"):  # its options are asked, not its weights
        return build_quantizer(**quantizer).why_not_listed()


@torch.no_grad()
def to_vq_model(net: DiscreteAutoencoder, *, unit_range: bool = False) -> VQModel:
    """The same tokenizer as a stock `VQModel`, with the same indices, where `why_no_vq_model` has
    no reason against it.

    Codes on the unit sphere stay there: nearest by Euclid is then nearest by cosine, whatever the
    vectors' length. Features are scaled by a power of two, which costs no digit, so that they are
    about as long as the codes: of long vectors distances lose what tells codes apart.

    Args:
        net: float32, on the CPU.
        unit_range: pixels in [0, 1] on both sides, and codes looked up by index: aMUSEd's. The
            first convolution then pads with black where training padded with grey. Codes are as
            wide as `latent_channels`, by which its pipelines shape them: zeros fill up.
    """
    assert not why_no_vq_model(net.config["quantizer"], net.config["likelihood"])
    weights = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("quantize.")}
    codebook = weights["quantize.embedding.weight"] = net.quantize.listed_codes()
    config = {name: net.config[name] for name in _SHARED}
    if unit_range:
        _fold_unit_range(weights)
        config["latent_channels"] = _make_as_wide(weights)
        codebook = weights["quantize.embedding.weight"]
    down, up = block_types(len(config["block_out_channels"]), net.config["attention_levels"])
    network: Any = VQModel  # diffusers types widths as one-element tuples
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
    """Make `stock`'s features about as long as its codes, where its codes have one length; returns
    the factor, a power of two.

    Args:
        images: in [-1, 1], to measure on.
    """
    lengths = stock.quantize.embedding.weight.norm(dim=1)
    if not torch.allclose(lengths, lengths[:1], rtol=1e-4):
        return 1.0
    features = net.encode(images).latents
    length = features.norm(dim=1).mean().clamp(min=1e-6)  # of a dead encoder it is 0
    factor = 2.0 ** round(math.log2(lengths[0] / length))
    for parameter in stock.quant_conv.parameters():
        parameter.mul_(factor)
    return factor


def _fold_unit_range(weights: dict[str, Tensor]) -> None:
    """Take x in [0, 1] for 2 x - 1, and give (y + 1) / 2 for y."""
    first = weights["encoder.conv_in.weight"]
    weights["encoder.conv_in.bias"] -= first.sum(dim=(1, 2, 3))
    first *= 2
    weights["decoder.conv_out.weight"] /= 2
    weights["decoder.conv_out.bias"] += 1
    weights["decoder.conv_out.bias"] /= 2


def _make_as_wide(weights: dict[str, Tensor]) -> int:
    """Fill features, codes and what lies around them up to one width; returns it."""
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
