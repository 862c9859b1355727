"""Write weights with the original names of taming-transformers and latent diffusion (CompVis).

    tensors = to_original(net)             # net: a stock VQModel or AutoencoderKL
    weights = from_original(tensors, net)  # the reverse (latentvae.models.original_names)

The original classes always have a quant_conv and a post_quant_conv. These classes also load a file
in which weights are missing, and leave the missing weights random. So for a network without
quant_conv and post_quant_conv (SD3, FLUX), identity layers are written, which change no values.
When diffusers loads the file, it skips the identity layers with a warning.

The original code keeps the scale of latents with the diffusion model, not with the autoencoder. The
file's metadata holds the scale and the complete config, so `load_network` can restore both.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from latentvae.errors import UserError
from latentvae.models import Network, family_of, load_network
from latentvae.models.original_names import with_original_names
from latentvae.models.single_file import CONFIG_KEY

_GROUPS = 32  # groups of the original GroupNorm, a constant in its code


def to_original(net: Network) -> dict[str, Tensor]:
    """Return the weights of diffusers' `VQModel` or `AutoencoderKL` by their original names.

    If the network lacks a 1 x 1 convolution before or after the latent, the result has an identity
    convolution there.

    Raises:
        UserError: the original code has no network like `net`.
    """
    if reason := _why_not(net):
        raise UserError(f"the original code (CompVis) cannot build this network: {reason}")
    return _identities(net) | with_original_names(net)


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


def convert(
    model: str | Path, out: Path, *, overwrite: bool = False, variant: str | None = None
) -> None:
    """Write the autoencoder in the folder (or Hub id) `model` to the file `out`.

    Args:
        model: argument of `load_network`.
        out: a .safetensors file.
        overwrite: replace an existing file.
        variant: variant of the model's weights, such as "fp16".

    Raises:
        UserError: the original code has no network like `model`, or `out` exists and may not be
            replaced, or the name of `out` does not end with .safetensors.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"out must be a .safetensors file (got '{out}')")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"'{out}' exists. Give another file or --overwrite.")
    net = load_network(model, variant=variant)
    tensors = {name: value.contiguous() for name, value in to_original(net).items()}
    config = original_config(net)

    # Write under another name first, so that a file with this name is always complete
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.writing-{os.getpid()}")
    part.write_bytes(save(tensors, metadata=_metadata(net, config)))
    part.replace(out)

    print(f"{out}: {len(tensors)} tensors, for the original {type(net).__name__} with\n")
    print(yaml.safe_dump({"params": config}, sort_keys=False, default_flow_style=None))
    print(_scale_text(net))


def _metadata(net: Network, config: dict[str, Any]) -> dict[str, str]:
    """Return the file's metadata, which the original class and `load_network` need."""
    scale = family_of(net).normalization(net)
    own = {"_class_name": type(net).__name__} | {
        name: value for name, value in net.config.items() if not name.startswith("_")
    }
    return {
        "format": "pt",
        "params": json.dumps(config),
        "scaling_factor": str(scale.scaling_factor),
        "shift_factor": str(scale.shift_factor),
        CONFIG_KEY: json.dumps(own),
    }


def _scale_text(net: Network) -> str:
    """Return a text for the terminal that says how a diffusion model must scale the latents."""
    scale, config = family_of(net).normalization(net), net.config
    lines = [f"scaling_factor: {scale.scaling_factor}", f"shift_factor: {scale.shift_factor}"]
    names = [name for name in ("latents_mean", "latents_std") if config.get(name) is not None]
    lines += [f"{name}: {list(config[name])}" for name in names]
    return "\n".join(
        [
            "A diffusion model must subtract shift_factor from the latents and multiply them by",
            "scaling_factor. In the original code, scaling_factor is the option scale_factor of",
            "the diffusion model. For latentvae, the file's metadata holds both factors:",
            "",
            *lines,
        ]
    )


def _identities(net: Network) -> dict[str, Tensor]:
    """Return identity convolutions (1 x 1) for moments (2 d channels) and latents (d channels)."""
    d, like = net.config["latent_channels"], {"dtype": net.dtype, "device": net.device}
    return {
        "quant_conv.weight": torch.eye(2 * d, **like)[:, :, None, None],
        "quant_conv.bias": torch.zeros(2 * d, **like),
        "post_quant_conv.weight": torch.eye(d, **like)[:, :, None, None],
        "post_quant_conv.bias": torch.zeros(d, **like),
    }


def _why_not(net: Network) -> str:
    """Return why the original code has no network like `net`, or "" if it has one."""
    if family_of(net).original_options(net) is None:
        return f"the original code has only VQModel and AutoencoderKL, no {type(net).__name__}"

    # Widths and groups
    config = net.config
    widths = config["block_out_channels"]
    if config["norm_num_groups"] != _GROUPS:
        return f"the original GroupNorm has {_GROUPS} groups, not {config['norm_num_groups']}"
    if any(width % widths[0] for width in widths):
        return f"the original widths are multiples of the first, not {', '.join(map(str, widths))}"

    # Attention
    if not config["mid_block_add_attention"]:
        return "the original middle block has attention"
    encoder, decoder = (
        ["Attn" in block for block in config[f"{side}_block_types"]] for side in ("down", "up")
    )
    if encoder != decoder[::-1]:
        return "the original encoder and decoder have attention at the same levels"

    # Layers and pixels
    if config["act_fn"] != "silu":
        return f"the original activation is silu, not {config['act_fn']}"
    if config.get("norm_type", "group") != "group":
        return "the original decoder has no spatial norm"
    if config.get("lookup_from_codebook"):
        return "the original pixels are in [-1, 1], so export without lookup_from_codebook"
    return ""
