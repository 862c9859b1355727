"""Convert tensor names between diffusers and the original code of VQGAN and latent diffusion.

The original code is taming-transformers (arXiv:2012.09841) and latent diffusion (arXiv:2112.10752),
both of CompVis. diffusers has the same networks, but gives their tensors other names. The original
code counts the decoder's levels in reverse order, and stores the matrices of attention layers as
1 x 1 convolutions.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from latentvae.models.network import Network

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


def original_name(name: str, levels: int) -> str:
    """Return the original name of a tensor in a network with the given number of levels."""
    for pattern, original in _RENAMES:
        name = re.sub(pattern, original, name)
    return re.sub(r"\bup\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)


def with_original_names(net: Network) -> dict[str, Tensor]:
    """Return the weights of diffusers' `VQModel` or `AutoencoderKL` by their original names."""
    levels = len(net.config["block_out_channels"])
    tensors = {}
    for name, value in net.state_dict().items():
        matrix = value.ndim == 2 and "attentions" in name
        tensors[original_name(name, levels)] = value[:, :, None, None] if matrix else value
    return tensors


def from_original(tensors: Mapping[str, Tensor], net: Network) -> dict[str, Tensor]:
    """Return weights that fit `net`, from tensors with the original names.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor does not have the shape that `net` needs.
    """
    levels, weights = len(net.config["block_out_channels"]), {}
    for name, own in net.state_dict().items():
        original = original_name(name, levels)
        weights[name] = in_shape_of(own, tensors[original], name=original)
    return weights


def in_shape_of(own: Tensor, value: Tensor, *, name: str) -> Tensor:
    """Return `value` in the shape of the tensor `own`. A 1 x 1 convolution becomes a matrix.

    Raises:
        ValueError: `value` does not fit this shape.
    """
    if value.numel() != own.numel() or value.shape[: own.ndim] != own.shape:
        shapes = f"{tuple(value.shape)}, but the network needs {tuple(own.shape)}"
        raise ValueError(f"{name} has the shape {shapes}")
    return value.view(own.shape)
