"""Networks from where users keep them: folders, the Hub, single files.

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

MAX_LAYERS = 1000  # of a block
_INNER = ("export", "vae", "vqvae", "movq")  # where runs and pipelines keep their autoencoder


def load_network(
    path: str | Path, *, dtype: torch.dtype | None = None, family: SingleFileKind | None = None
) -> Network:
    """Any autoencoder of images that diffusers knows, on the CPU.

    Args:
        path: a folder with config.json and the weights as safetensors; a `.safetensors` file of
            Stable Diffusion, SDXL, SD3 or FLUX; or, where there is no such folder, `owner/name` or
            `owner/name/folder` on the Hub.
        dtype: None is float32.
        family: of a single file, see `load_single_file`.

    Raises:
        UserError: no such folder, not an autoencoder, or damaged weights.
    """
    check_no_password(str(path))
    if Path(path).is_file() and not (Path(path).parent / "config.json").is_file():
        single: Any = load_single_file(Path(path), family=family)
        # diffusers' own `to` warns of "modules that should be kept in float32: []" at any dtype.
        nn.Module.to(single, dtype or torch.float32)
        return single
    repository, subfolder = _locate(path)
    config = _read_config(repository, subfolder)
    cls = _class_of(config, path)
    check_depth(config, f"{path}/config.json")
    try:
        net, loading = cls.from_pretrained(
            repository,
            subfolder=subfolder,
            torch_dtype=dtype or torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    # Not a list of types: a config that is not its class's fails in whichever way the class has.
    except Exception as error:
        raise UserError(f"cannot load the weights in '{path}': {_first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            keys = f"{kind.replace('_', ' ')} ({len(loading[kind])}, first {loading[kind][0]})"
            raise UserError(f"the weights in '{path}' do not fit its config.json: {keys}")
    return net


def _locate(path: str | Path) -> tuple[str, str | None]:
    """A folder as it is, or a repository and the folder in it."""
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
        raise UserError(f"'{path}' is a file; give the folder with config.json and the weights")
    if not (path / "config.json").is_file():
        inner = next((p for p in _INNER if (path / p / "config.json").is_file()), None)
        hint = f"; did you mean '{path / inner}'?" if inner else ""
        raise UserError(f"'{path}' holds no config.json, so it is no model folder{hint}")


def _near(path: Path) -> str:
    """What the first part of the path that is not there may have been meant to be."""
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
                "or owner/name/folder (a pipeline's is owner/name/vae): "
                f"{_first_line(error)}{_near(Path(where))}"
            )
        raise UserError(text) from error


def check_depth(config: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a network that would take for ever to build: numbers of layers cost a file nothing."""
    for name, value in config.items():
        counts = value if isinstance(value, list | tuple) else [value]
        if "layers" in name and any(isinstance(n, int) and n > MAX_LAYERS for n in counts):
            raise UserError(f"'{path}' asks for {name} {value}; {MAX_LAYERS} is the most")


def _class_of(config: dict[str, Any], path: str | Path) -> Any:
    """The class that the config names, if it is a network of diffusers with the calls."""
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise UserError(f"'{path}/config.json' is not the config of a diffusers model")
    cls = class_named(name)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise UserError(f"'{path}' holds a {name}, which this diffusers does not know")
    if not (hasattr(cls, "encode") and hasattr(cls, "decode")):
        raise UserError(f"'{path}' holds a {name}; an autoencoder has encode and decode")
    return cls


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
