"""Load networks from folders, the Hub and single files.

net = load_network("runs/demo/export")
net = load_network("stabilityai/stable-diffusion-xl-base-1.0/vae")  # owner/name/folder
net = load_network("sdxl_vae.safetensors", family="sdxl")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import nn

from latentvae.errors import UserError, check_no_password, nearest
from latentvae.models.network import Network
from latentvae.models.single_file import SingleFileKind, load_single_file
from latentvae.models.table import class_named

MAX_LAYERS = 1000  # in a block
_INNER = ("export", "vae", "vqvae", "movq")  # folders of runs and pipelines with an autoencoder


def load_network(
    path: str | Path, *, dtype: torch.dtype | None = None, family: SingleFileKind | None = None
) -> Network:
    """Return an autoencoder of images of any class of diffusers, on the CPU.

    Args:
        path: a folder with config.json and the weights as safetensors, or a `.safetensors` file of
            Stable Diffusion, SDXL, SD3 or FLUX. If neither is there, `owner/name` or
            `owner/name/folder` on the Hub.
        dtype: of the weights. None is float32.
        family: of a single file, see `load_single_file`.

    Raises:
        UserError: the folder is missing, it holds no autoencoder, or its weights are damaged.
    """
    check_no_password(str(path))

    # A single file
    if Path(path).is_file() and not (Path(path).parent / "config.json").is_file():
        single: Any = load_single_file(Path(path), family=family)
        # Not diffusers' own `to`: it warns of "modules that should be kept in float32: []".
        nn.Module.to(single, dtype or torch.float32)
        return single

    # Its class
    repository, subfolder = _locate(path)
    config = _read_config(repository, subfolder)
    cls = _class_of(config, path)
    check_depth(config, f"{path}/config.json")

    # Its weights
    try:
        net, loading = cls.from_pretrained(
            repository,
            subfolder=subfolder,
            torch_dtype=dtype or torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    # Every type: how a config of another class fails depends on the class.
    except Exception as error:
        raise UserError(f"cannot load the weights in '{path}': {_first_line(error)}") from error

    # A network with random weights is not what the user has
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            keys = f"{kind.replace('_', ' ')} ({len(loading[kind])}, first {loading[kind][0]})"
            raise UserError(f"the weights in '{path}' do not fit its config.json: {keys}")
    return net


def _locate(path: str | Path) -> tuple[str, str | None]:
    """Return a folder and None, or a repository on the Hub and the folder in it."""
    folder, parts = Path(path), str(path).split("/")
    on_disk = folder.exists() or (folder.parent.is_dir() and folder.parent != Path("."))
    may_be_on_hub = isinstance(path, str) and len(parts) >= 2 and all(parts) and parts[0] != "."
    if on_disk or not may_be_on_hub or Path(parts[0]).exists():
        _check_folder(folder)
        return str(folder), None
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise UserError(f"no such model folder '{path}'{_near(path)}")
    if not path.is_dir():
        raise UserError(f"'{path}' is a file. Give the folder with config.json and the weights.")
    if not (path / "config.json").is_file():
        inner = next((p for p in _INNER if (path / p / "config.json").is_file()), None)
        hint = f"; did you mean '{path / inner}'?" if inner else ""
        raise UserError(f"'{path}' holds no config.json, so it is no model folder{hint}")


def _near(path: Path) -> str:
    """Return a suggestion for the first part of the path that does not exist, or ""."""
    for part in [*reversed(path.parents), path]:
        if not part.exists():
            return nearest(part.name, (sibling.name for sibling in part.parent.iterdir()))
        if not part.is_dir():
            break
    return ""


def _read_config(repository: str, subfolder: str | None) -> dict[str, Any]:
    where = "/".join(filter(None, (repository, subfolder)))
    try:
        config: Any = AutoencoderKL.load_config(repository, subfolder=subfolder)  # of any class
        return config
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if Path(repository).is_dir():
            text = f"'{where}/config.json' is not the config of a diffusers model"
        else:
            text = (
                f"'{where}' is neither a folder here nor can it be read from the Hub as owner/name "
                "or owner/name/folder (in a pipeline: owner/name/vae): "
                f"{_first_line(error)}{_near(Path(where))}"
            )
        raise UserError(text) from error


def check_depth(config: Mapping[str, Any], path: str | Path) -> None:
    """Check that no number of layers in a config is so large that building would not end.

    Raises:
        UserError: a number of layers is above `MAX_LAYERS`.
    """
    for name, value in config.items():
        counts = value if isinstance(value, list | tuple) else [value]
        if "layers" in name and any(isinstance(n, int) and n > MAX_LAYERS for n in counts):
            raise UserError(f"{name} must be at most {MAX_LAYERS} (got {value} in '{path}')")


def _class_of(config: dict[str, Any], path: str | Path) -> Any:
    """Return the class that the config names. It must be an autoencoder that diffusers knows."""
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise UserError(f"'{path}/config.json' is not the config of a diffusers model")
    cls = class_named(name)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise UserError(f"'{path}' holds a {name}, which this version of diffusers does not know")
    if not (hasattr(cls, "encode") and hasattr(cls, "decode")):
        raise UserError(
            f"'{path}' holds a {name}, which is no autoencoder: it has no encode and decode"
        )
    return cls


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
