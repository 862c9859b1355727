"""Weights with the original names of taming-transformers and latent diffusion (CompVis).

    tensors = to_original(net)             # of a stock VQModel or AutoencoderKL
    weights = from_original(tensors, net)  # back again, for a network of that shape

diffusers' networks are those of arXiv:2012.09841 and arXiv:2112.10752 with other names. The levels
of the decoder are counted from the other end, and the attention's matrices are 1 x 1 convolutions.

The original classes always have a quant_conv and a post_quant_conv. They also load files in which
weights are missing, and these weights stay random. So identities are written for a network without
these layers (SD3, FLUX). diffusers skips them with a warning, and latentvae makes the layers that
the file has. The numbers are the same.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from latentvae.errors import UserError
from latentvae.models import Network, family_of, load_network

_RENAMES = (  # diffusers' names and the original ones, in this order
    (r"(down|up)_blocks\.(\d+)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d+)\.attentions", r"\1.\2.attn"),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"(attn\w*(?:\.\d+)?)\.group_norm", r"\1.norm"),
    (r"(attn\w*(?:\.\d+)?)\.to_([qkv])", r"\1.\2"),
    (r"(attn\w*(?:\.\d+)?)\.to_out\.0", r"\1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)
_GROUPS = 32  # of the original GroupNorm, a constant in its code


def to_original(net: Network) -> dict[str, Tensor]:
    """Return the weights of a stock `VQModel` or `AutoencoderKL` by their original names.

    Identities take the place of 1 x 1 convolutions around the latent that the network lacks.

    Raises:
        UserError: the original code has no such network.
    """
    if reason := _why_not(net):
        raise UserError(f"the original code has no such network: {reason}")
    levels = len(net.config["block_out_channels"])
    tensors = {}
    for name, value in net.state_dict().items():
        matrix = value.ndim == 2 and "attentions" in name
        tensors[_renamed(name, levels)] = value[:, :, None, None] if matrix else value
    return _identities(net) | tensors


def from_original(tensors: Mapping[str, Tensor], net: Network) -> dict[str, Tensor]:
    """Return weights that fit a network of the shape of `net`, the inverse of `to_original`.

    Raises:
        KeyError: a tensor is missing.
    """
    levels = len(net.config["block_out_channels"])
    return {
        name: tensors[_renamed(name, levels)].view(value.shape)
        for name, value in net.state_dict().items()
    }


def original_config(net: Network) -> dict[str, Any]:
    """Return the original class's arguments: `embed_dim`, `ddconfig`, and a VQModel's `n_embed`."""
    own = family_of(net).original_options(net)
    assert own is not None, type(net)
    config = net.config
    widths, side = config["block_out_channels"], config["sample_size"]
    attention = [i for i, block in enumerate(config["down_block_types"]) if "Attn" in block]

    shape = {
        "double_z": own.pop("double_z"),
        "z_channels": config["latent_channels"],
        "resolution": side,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [side // 2**i for i in attention],
        "dropout": 0.0,
    }

    width = config.get("vq_embed_dim") or config["latent_channels"]
    return {"embed_dim": width, **own, "ddconfig": shape}


def convert(model: str | Path, out: Path, *, overwrite: bool = False) -> None:
    """Write the autoencoder in the folder (or Hub id) `model` to the file `out`.

    Raises:
        UserError: the network has no original class, or `out` exists or is no .safetensors file.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"out must be a .safetensors file (got '{out}')")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"'{out}' exists. Give another file or --overwrite.")
    net = load_network(model)
    tensors = {name: value.contiguous() for name, value in to_original(net).items()}
    config = original_config(net)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.writing-{os.getpid()}")
    part.write_bytes(save(tensors, metadata={"format": "pt", "params": json.dumps(config)}))
    part.replace(out)
    print(f"{out}: {len(tensors)} tensors, for the original {type(net).__name__} with\n")
    print(yaml.safe_dump({"params": config}, sort_keys=False, default_flow_style=None))


def _renamed(name: str, levels: int) -> str:
    for pattern, original in _RENAMES:
        name = re.sub(pattern, original, name)
    return re.sub(r"\bup\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)


def _identities(net: Network) -> dict[str, Tensor]:
    """Return 1 x 1 convolutions of moments (2 d) and latents (d) that change nothing."""
    d, like = net.config["latent_channels"], {"dtype": net.dtype, "device": net.device}
    return {
        "quant_conv.weight": torch.eye(2 * d, **like)[:, :, None, None],
        "quant_conv.bias": torch.zeros(2 * d, **like),
        "post_quant_conv.weight": torch.eye(d, **like)[:, :, None, None],
        "post_quant_conv.bias": torch.zeros(d, **like),
    }


def _why_not(net: Network) -> str:
    """Return a clause that says what the original code has instead of this network, or ""."""
    if family_of(net).original_options(net) is None:
        return f"it has a VQModel and an AutoencoderKL, no {type(net).__name__}"

    # Widths and groups
    config = net.config
    widths = config["block_out_channels"]
    if config["norm_num_groups"] != _GROUPS:
        return f"its GroupNorm has {_GROUPS} groups, not {config['norm_num_groups']}"
    if any(width % widths[0] for width in widths):
        return f"its widths are multiples of the first, not {', '.join(map(str, widths))}"

    # Attention
    if not config["mid_block_add_attention"]:
        return "its middle block has attention"
    encoder, decoder = (
        ["Attn" in block for block in config[f"{side}_block_types"]] for side in ("down", "up")
    )
    if encoder != decoder[::-1]:
        return "its encoder and decoder have attention at the same levels"

    # Layers and pixels
    if config["act_fn"] != "silu":
        return f"its activation is silu, not {config['act_fn']}"
    if config.get("norm_type", "group") != "group":
        return "its decoder has no spatial norm"
    if config.get("lookup_from_codebook"):
        return "its pixels are in [-1, 1], so export without lookup_from_codebook"
    return ""
