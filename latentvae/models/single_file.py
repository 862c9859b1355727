"""One `.safetensors` file with the autoencoder of Stable Diffusion, SDXL, SD3 or FLUX.

The file is a whole checkpoint of the original code or its autoencoder alone, with CompVis' names or
diffusers' (old or new). diffusers maps the names. Widths, channels and blocks are read from the
tensors. The tensors do not show the scale of the latents and the 32 groups of GroupNorm. These
follow from the family.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentvae.errors import UserError, nearest

# Families of models whose autoencoder a file may hold.
SingleFileKind = Literal["sd", "sdxl", "sd3", "flux"]
SINGLE_FILE_KINDS: tuple[SingleFileKind, ...] = get_args(SingleFileKind)

# scaling_factor, shift_factor, sample_size and force_upcast of the families' published configs
# (runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0,
# stabilityai/stable-diffusion-3-medium-diffusers, black-forest-labs/FLUX.1-dev; folder vae).
_SCALES: dict[SingleFileKind, dict[str, Any]] = {
    "sd": {"scaling_factor": 0.18215, "sample_size": 512},
    "sdxl": {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024},
}
_CHANNELS = {"sd": 4, "sdxl": 4, "sd3": 16, "flux": 16}
_PREFIXES = ("first_stage_model.", "vae.", "")  # in a whole checkpoint, and in the part alone
_MARKS: dict[str, SingleFileKind] = {  # other parts of a whole checkpoint
    "conditioner.embedders.": "sdxl",
    "cond_stage_model.": "sd",
    "model.diffusion_model.joint_blocks.": "sd3",
    "model.diffusion_model.double_blocks.": "flux",
}
_PARTS = ("encoder.", "decoder.", "quant_conv", "post_quant")
_GROUPS = 32
# diffusers' names in the middle attention before version 0.17, and now.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_single_file(path: Path, *, family: SingleFileKind | None) -> AutoencoderKL:
    """Return the autoencoder in a file, in float32.

    Args:
        path: the file.
        family: decides the scale of the latents. None reads it from a whole checkpoint.

    Raises:
        UserError: the file holds no such autoencoder, or does not show its family.
    """
    if family is not None and family not in SINGLE_FILE_KINDS:
        hint = nearest(family, SINGLE_FILE_KINDS)
        raise UserError(
            f"family must be one of {', '.join(SINGLE_FILE_KINDS)} (got '{family}'){hint}"
        )
    tensors, whole = _read(path)
    family = family or whole
    if family is None:
        raise UserError(
            f"'{path}' does not say how its latents are scaled, because it holds only an "
            f"autoencoder. Give its family: {', '.join(SINGLE_FILE_KINDS)}."
        )

    # The network, with the file's weights
    original = "encoder.down.0.block.0.conv1.weight" in tensors
    try:
        config = _config(tensors, path, original=original) | _SCALES[family]
        net: Any = AutoencoderKL.from_config(config)
        if original:
            tensors = convert_ldm_vae_checkpoint(tensors, config)
        else:
            tensors = dict(_renewed(name, value) for name, value in tensors.items())
        if config["latent_channels"] == _CHANNELS[family]:
            net.load_state_dict({name: value.float() for name, value in tensors.items()})
    except UserError:
        raise
    # Tensors are missing, unknown or have another shape.
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"'{path}' is not the autoencoder of this family: {reason}") from error

    if config["latent_channels"] != _CHANNELS[family]:
        raise UserError(
            f"'{path}' has {config['latent_channels']} latent channels, but those of the family "
            f"'{family}' have {_CHANNELS[family]}. If it has no family, give its diffusers folder."
        )
    return net


def _read(path: Path) -> tuple[dict[str, Tensor], SingleFileKind | None]:
    """Return the autoencoder's tensors by name, and the family of a whole checkpoint."""
    if path.suffix != ".safetensors":
        raise UserError(f"'{path}' is no .safetensors file. Other formats can hold code.")
    try:
        with safe_open(path, framework="pt") as file:
            # A whole checkpoint has other parts beside the autoencoder's
            names = list(file.keys())
            prefix = next(p for p in _PREFIXES if any(n.startswith(f"{p}encoder.") for n in names))
            parts = tuple(prefix + part for part in _PARTS)
            own = [name for name in names if name.startswith(parts)]

            if f"{prefix}quantize.embedding.weight" in names:
                raise UserError(
                    f"'{path}' holds a VQModel, but as a single file only an AutoencoderKL can be "
                    "read. Give its diffusers folder."
                )
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in own}
    except StopIteration as error:
        raise UserError(f"'{path}' holds no autoencoder: no tensor is named encoder.*") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read '{path}': {error}") from error
    return tensors, _family(names)


def _family(names: list[str]) -> SingleFileKind | None:
    for mark, family in _MARKS.items():
        if any(name.startswith(mark) for name in names):
            return family
    return None


def _renewed(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Return a tensor of the middle attention with its present name, and always as a matrix."""
    match = re.fullmatch(r"(.*\.attentions\.0)\.(\w+)(?:\.0)?\.(weight|bias)", name)
    if match is None or match[2] == "group_norm":
        return name, value
    part = {"to_out": "to_out.0"} | _OLD_ATTENTION
    matrix = value.flatten(1) if match[3] == "weight" and value.shape[2:].numel() == 1 else value
    return f"{match[1]}.{part.get(match[2], match[2])}.{match[3]}", matrix


def _config(tensors: Mapping[str, Tensor], path: Path, *, original: bool) -> dict[str, Any]:
    """Return the config of the network that the tensors fit."""
    # Levels and blocks
    block = r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight"
    if not original:
        block = r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight"
    found = {m.groups(): name for name in tensors if (m := re.fullmatch(block, name))}
    if ("0", "0") not in found or "decoder.conv_in.weight" not in tensors:
        raise UserError(f"'{path}' holds no autoencoder of this kind: its blocks have other names")
    levels = 1 + max(int(level) for level, _ in found)
    layers = 1 + max(int(number) for level, number in found if level == "0")
    _check_blocks(tensors, path, missing=levels * layers > len(found))
    widths = tuple(tensors[found[str(level), "0"]].shape[0] for level in range(levels))
    _check_widths(widths, path)

    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "shift_factor": None,
    }


def _check_blocks(tensors: Mapping[str, Tensor], path: Path, *, missing: bool) -> None:
    if any(re.search(r"\b(down|up)(_blocks)?\.\d+\.att(n|entions)\.", name) for name in tensors):
        raise UserError(
            f"'{path}' has attention in its levels, but these families have it only in the middle "
            "block. Give its diffusers folder."
        )
    if missing:  # a large number in a name is no reason to build that many blocks
        raise UserError(f"'{path}' holds no autoencoder of this kind: some of its blocks are gone")


def _check_widths(widths: Sequence[int], path: Path) -> None:
    if any(width % _GROUPS for width in widths):
        raise UserError(
            f"'{path}' has levels of {', '.join(map(str, widths))} channels, but those of these "
            f"families are multiples of {_GROUPS}, the groups of their GroupNorm. A single file "
            "does not say how many groups there are. Give a diffusers folder, whose config.json "
            "does."
        )
