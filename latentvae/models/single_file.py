"""Load an `AutoencoderKL` or a `VQModel` from one `.safetensors` file.

The file is a complete checkpoint of the original code (CompVis, taming-transformers), or holds only
an autoencoder. A complete checkpoint holds the autoencoder and other parts of a model, such as the
diffusion model. The tensors have CompVis' names, or diffusers' old or new names. A file that
`latentvae convert` wrote has the network's config in its metadata. If a file has no config, the
numbers of channels, blocks, attention layers and codes follow from its tensors. Two facts are not
in the tensors: the number of groups in GroupNorm, and the scale of the latents. The number of
GroupNorm's groups is assumed to be 32. If the file stores no scale of the latents, the scale
follows from the model family, such as SDXL.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, VQModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentvae.errors import UserError, nearest
from latentvae.models.config_check import check_depth
from latentvae.models.network import Network
from latentvae.models.original_names import from_original, in_shape_of, original_name
from latentvae.models.wrapper_names import plain_names, say, say_removed

# Families of models whose autoencoder a file may hold. "other" is any other model. The scale of its
# latents is not known.
SingleFileKind = Literal["sd", "sdxl", "sd3", "flux", "other"]
SINGLE_FILE_KINDS: tuple[SingleFileKind, ...] = get_args(SingleFileKind)

# scaling_factor, shift_factor, sample_size and force_upcast of the families' published configs
# (runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0,
# stabilityai/stable-diffusion-3-medium-diffusers, black-forest-labs/FLUX.1-dev; folder vae).
_SCALES: dict[SingleFileKind, dict[str, Any]] = {
    "sd": {"scaling_factor": 0.18215, "sample_size": 512},
    "sdxl": {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024},
    "other": {"scaling_factor": 1.0, "shift_factor": 0.0, "sample_size": 256},
}
_CHANNELS = {"sd": 4, "sdxl": 4, "sd3": 16, "flux": 16}
# Prefixes of the autoencoder's tensors. "" is for a file with only the autoencoder.
_PREFIXES = ("first_stage_model.", "vae.", "")
# Prefixes of other tensors of a complete checkpoint, which show the model family.
_MARKS: dict[str, SingleFileKind] = {
    "conditioner.embedders.": "sdxl",
    "cond_stage_model.": "sd",
    "model.diffusion_model.joint_blocks.": "sd3",
    "model.diffusion_model.double_blocks.": "flux",
}
_PARTS = ("encoder.", "decoder.", "quant_conv", "post_quant", "quantize.")
_GROUPS = 32
_CODES = "quantize.embedding.weight"
# diffusers' names in attention layers before version 0.17, and the current names.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

CONFIG_KEY = "diffusers_config"  # in the metadata that `latentvae convert` writes
_CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


@dataclass(frozen=True)
class _File:
    """The autoencoder's tensors in a `.safetensors` file, and the file's family, scale and config.

    Attributes:
        path: path of the file.
        tensors: the autoencoder's tensors by name, without the prefix that the names have in a
            complete checkpoint.
        family: model family that the other tensors of a complete checkpoint show, otherwise None.
        scale: `scale_factor` that a complete checkpoint of latent diffusion stores, otherwise None.
        config: config of the network, if the metadata has it, otherwise None.
    """

    path: Path
    tensors: dict[str, Tensor]
    family: SingleFileKind | None
    scale: float | None
    config: dict[str, Any] | None

    @property
    def has_original_names(self) -> bool:
        return "encoder.down.0.block.0.conv1.weight" in self.tensors


def load_single_file(path: Path, *, family: SingleFileKind | None) -> Network:
    """Load the autoencoder in a file, and return it in float32.

    Args:
        path: the file.
        family: model family, such as "sdxl". The family decides the scale of the latents if the
            file does not store a scale. With None, the family is recognised if the file is a
            checkpoint of a whole model, such as Stable Diffusion.

    Raises:
        UserError: the file holds no `AutoencoderKL` or `VQModel`, or `family` does not fit the
            file. The error also occurs if `family` is None, and the file has an `AutoencoderKL`
            with 4 or 16 latent channels but neither the family nor the scale of the latents.
    """
    if family is not None and family not in SINGLE_FILE_KINDS:
        hint = nearest(family, SINGLE_FILE_KINDS)
        raise UserError(
            f"family must be one of {', '.join(SINGLE_FILE_KINDS)} (got '{family}'){hint}"
        )
    file = _read(path)

    try:
        if file.config is None:
            cls, config = _derive(file, family)
        else:
            cls, config = _CLASSES[file.config["_class_name"]], file.config
            _compare_scales(file, family)
        with torch.device("meta"):  # use no memory before it is known that the tensors fit
            net: Any = cls.from_config(config)
        weights = _fitting_weights(file, net)
    except UserError:
        raise
    # Tensors may be missing, unknown or of another shape. Metadata may hold anything.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        if isinstance(error, KeyError):
            reason = f"the tensor {reason} is missing"
        raise UserError(f"'{path}' holds no autoencoder that can be read: {reason}") from error

    # Copy the tensors, because sums over a memory-mapped file can depend on its alignment
    weights = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
    net.load_state_dict(weights, assign=True)
    return net


def _read(path: Path) -> _File:
    if path.suffix != ".safetensors":
        raise UserError(
            f"'{path}' is no .safetensors file. Other formats can hold code that does harm, so "
            "latentvae does not read them."
        )
    try:
        with safe_open(path, framework="pt") as file:
            # A complete checkpoint has other parts beside the autoencoder
            names = plain_names(file.keys(), path=path)
            prefix = _prefix(list(names.values()), path)
            parts = tuple(prefix + part for part in _PARTS)
            own = {name: plain for name, plain in names.items() if plain.startswith(parts)}

            config = _read_config(file.metadata() or {}, path)
            tensors = {own[name].removeprefix(prefix): file.get_tensor(name) for name in own}
            measured = [name for name, plain in names.items() if plain == "scale_factor"]
            scale = file.get_tensor(measured[0]).item() if measured else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read '{path}': {error}") from error

    say_removed(own, path=path)
    if prefix not in _PREFIXES:
        say(f"the names of the tensors in '{path}' begin with '{prefix}', which is removed")
    return _File(path, tensors, _family(list(names.values())), scale, config)


def _prefix(names: Sequence[str], path: Path) -> str:
    """Return the part before `encoder.` in the names of the autoencoder's tensors."""
    first = "encoder.conv_in.weight"
    found = [name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")]
    found = found or [p for p in _PREFIXES if any(n.startswith(f"{p}encoder.") for n in names)]
    if not found:
        raise UserError(f"'{path}' holds no autoencoder: no tensor is named encoder.*")
    known = [prefix for prefix in _PREFIXES if prefix in found]
    return known[0] if known else min(found, key=len)


def _read_config(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """Return the network's config in a file's metadata, or None."""
    if (text := metadata.get(CONFIG_KEY)) is None:
        return None
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict) or config.get("_class_name") not in _CLASSES:
        kinds = " or ".join(_CLASSES)
        raise UserError(
            f"the {CONFIG_KEY} in the metadata of '{path}' is not the config of an {kinds}"
        )
    check_depth(config, path)
    return config


def _compare_scales(file: _File, family: SingleFileKind | None) -> None:
    """Print a note if the file's `scaling_factor` is not that of the family that the user gave."""
    assert file.config is not None
    if family is None or file.config["_class_name"] != "AutoencoderKL":
        return
    own, other = file.config.get("scaling_factor"), _SCALES[family]["scaling_factor"]
    if own != other:
        say(
            f"'{file.path}' says in its metadata that scaling_factor is {own}, so the value "
            f"{other} of family '{family}' is not used"
        )


def _family(names: Sequence[str]) -> SingleFileKind | None:
    for mark, family in _MARKS.items():
        if any(name.startswith(mark) for name in names):
            return family
    return None


def _fitting_weights(file: _File, net: Network) -> dict[str, Tensor]:
    """Return the weights of `net` from a file, which must hold all tensors of `net`.

    The file must not hold other tensors of an encoder or decoder.
    """
    if file.has_original_names:
        weights = from_original(file.tensors, net)
        levels = len(net.config["block_out_channels"])
        others = file.tensors.keys() - {original_name(name, levels) for name in weights}
    else:
        tensors = dict(_renewed(name, value) for name, value in file.tensors.items())
        shapes = net.state_dict()
        weights = {n: in_shape_of(own, tensors[n], name=n) for n, own in shapes.items()}
        others = tensors.keys() - weights.keys()

    # For networks without quant_conv and post_quant_conv, `latentvae convert` writes identities
    others = [name for name in others if name.startswith(("encoder.", "decoder."))]
    if others:
        kind = type(net).__name__
        raise UserError(
            f"'{file.path}' is no {kind} of diffusers: besides the tensors of this class, the file "
            f"has {len(others)} other tensors, such as {min(others)}"
        )
    return weights


def _renewed(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Return a tensor and its name, both as in current versions of diffusers.

    Attention weights that are 1 x 1 convolutions become matrices.
    """
    match = re.fullmatch(r"(.*\.attentions\.\d+)\.(\w+)(?:\.0)?\.(weight|bias)", name)
    if match is None or match[2] == "group_norm":
        return name, value
    part = {"to_out": "to_out.0"} | _OLD_ATTENTION
    matrix = value.flatten(1) if match[3] == "weight" and value.shape[2:].numel() == 1 else value
    return f"{match[1]}.{part.get(match[2], match[2])}.{match[3]}", matrix


def _derive(file: _File, family: SingleFileKind | None) -> tuple[Any, dict[str, Any]]:
    """Return the class and the config of the network that the tensors fit."""
    tensors = file.tensors
    config = _shape(file)
    scale = {} if file.scale is None else {"scaling_factor": file.scale}
    if _CODES in tensors:
        number, width = tensors[_CODES].shape
        codes = {"num_vq_embeddings": number, "vq_embed_dim": width, "scaling_factor": 1.0}
        return VQModel, config | codes | scale | {"sample_size": 256}

    # The scale of the latents is known only if the model family is known
    channels = config["latent_channels"]
    known = file.family is not None and _CHANNELS[file.family] == channels
    family = family or (file.family if known else "other" if scale else None)
    if family is None and channels not in _CHANNELS.values():
        family = "other"
        say(
            f"'{file.path}' has {channels} latent channels and does not say how its latents are "
            "scaled, so scaling_factor is 1.0"
        )
    if family is None:
        raise UserError(
            f"'{file.path}' does not say how its latents are scaled. Give the file's model family "
            "(family= of latentvae.load, or --pretrained_family in training): "
            f"{', '.join(SINGLE_FILE_KINDS)}."
        )
    if channels != _CHANNELS.get(family, channels):
        raise UserError(
            f"'{file.path}' has {channels} latent channels, but autoencoders of the family "
            f"'{family}' have {_CHANNELS[family]}. If the file belongs to none of latentvae's "
            "model families, give 'other' as the family (scaling_factor 1.0)."
        )
    quantized = {
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "shift_factor": None,
    }
    return AutoencoderKL, config | quantized | _SCALES[family] | scale


def _shape(file: _File) -> dict[str, Any]:
    """Derive from the tensors the options that `AutoencoderKL` and `VQModel` both have."""
    tensors, path = file.tensors, file.path

    # Levels and blocks
    block = r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv1\.weight"
    found = {m.groups(): name for name in tensors if (m := re.fullmatch(block, name))}
    if ("0", "0") not in found or "decoder.conv_in.weight" not in tensors:
        raise UserError(
            f"'{path}' holds no AutoencoderKL or VQModel: its blocks have other names than the "
            "blocks of these classes"
        )
    levels = 1 + max(int(level) for level, _ in found)
    layers = 1 + max(int(number) for level, number in found if level == "0")
    if levels * layers > len(found):  # some blocks are missing, or a name has a huge number
        raise UserError(
            f"'{path}' holds no complete AutoencoderKL or VQModel: some of its blocks are missing"
        )
    widths = tuple(tensors[found[str(level), "0"]].shape[0] for level in range(levels))
    _check_widths(widths, path)

    # Attention. In original names, the decoder's levels are counted from the other end
    down, up = (_attention_levels(tensors, side) for side in ("encoder.down", "decoder.up"))
    if file.has_original_names:
        up = {levels - 1 - level for level in up}
    middle = any(re.match(r"encoder\.mid(_block)?\.att(n|entions)", name) for name in tensors)

    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": _blocks("DownEncoderBlock2D", levels, down),
        "up_block_types": _blocks("UpDecoderBlock2D", levels, up),
        "mid_block_add_attention": middle,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
    }


def _attention_levels(tensors: Mapping[str, Tensor], side: str) -> set[int]:
    level = rf"{re.escape(side)}(?:_blocks)?\.(\d+)\.att(?:n|entions)\."
    return {int(match[1]) for name in tensors if (match := re.match(level, name))}


def _blocks(name: str, levels: int, attention: set[int]) -> tuple[str, ...]:
    return tuple(f"Attn{name}" if level in attention else name for level in range(levels))


def _check_widths(widths: Sequence[int], path: Path) -> None:
    if any(width % _GROUPS for width in widths):
        raise UserError(
            f"'{path}' has levels of {', '.join(map(str, widths))} channels. In a single file, the "
            f"numbers of channels must be multiples of {_GROUPS}, because {_GROUPS} groups are "
            "assumed for GroupNorm. Give a diffusers folder instead, whose config.json has the "
            "number of groups."
        )
