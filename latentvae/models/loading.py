"""Load networks from folders, the Hub and single files.

net = load_network("runs/demo/export")
net = load_network("stabilityai/stable-diffusion-xl-base-1.0/vae")  # owner/name/folder
net = load_network("sdxl_vae.safetensors", family="sdxl")
"""

import difflib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn

from latentvae.errors import UserError, check_no_password, first_line, nearest
from latentvae.models.config_check import check_depth
from latentvae.models.network import Network
from latentvae.models.single_file import SingleFileKind, load_single_file
from latentvae.models.table import class_named
from latentvae.models.weight_files import choose_variant, is_weights, names_of, variant_of
from latentvae.models.wrapper_names import plain_names, say_removed

# Subfolders that hold the autoencoder of a training run or of a pipeline.
_INNER = ("export", "vae", "vqvae", "movq")


def load_network(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    family: SingleFileKind | None = None,
    variant: str | None = None,
) -> Network:
    """Load an image autoencoder of any class of diffusers or latentvae, and return it on the CPU.

    Args:
        path: a folder with config.json and the weights as safetensors, or a `.safetensors` file
            with an AutoencoderKL or a VQModel. A path that does not exist is read as `owner/name`
            or `owner/name/folder` on the Hugging Face Hub.
        dtype: dtype of the weights. None is float32.
        family: model family of a single file, such as "sdxl", see `load_single_file`.
        variant: variant of the weights in a folder, such as "fp16". None loads the weights without
            a variant name, or the only variant that exists.

    Raises:
        UserError: `path` does not exist, holds no autoencoder or has no such variant, or the
            weights are damaged.
    """
    check_no_password(str(path))

    # A single file. If it holds the weights of the folder that it is in, load the folder instead
    if (file := Path(path)).is_file():
        if not _is_of_folder(file):
            single: Any = load_single_file(file, family=family)
            # diffusers' own `to` would warn of "modules that should be kept in float32: []".
            nn.Module.to(single, dtype or torch.float32)
            return single
        path, variant = file.parent, variant_of(file.name)

    # The network's class
    repository, subfolder = _locate(path)
    config = _read_config(repository, subfolder)
    cls = _class_of(config, path)
    check_depth(config, f"{path}/config.json")

    # The network's weights
    if Path(repository).is_dir():
        variant = choose_variant(names_of(repository, subfolder), variant, path=path)
    source = _Source(cls, repository, subfolder, dtype or torch.float32, path)
    return source.load(variant)


class _Source:
    """A model folder, on the disk or on the Hub, from which a network of `cls` is loaded.

    Args:
        cls: the network's class.
        repository, subfolder: arguments of diffusers' `from_pretrained`.
        dtype: dtype of the weights.
        path: the path that the user gave, for messages.
    """

    def __init__(
        self, cls: Any, repository: str, subfolder: str | None, dtype: torch.dtype, path: str | Path
    ) -> None:
        self.cls, self.repository, self.subfolder = cls, repository, subfolder
        self.dtype, self.path = dtype, path

    def load(self, variant: str | None) -> Any:
        """Load the network with the weights of a variant, such as "fp16". All weights must fit."""
        try:
            net, loading = self._from_pretrained(variant)
        # Catch all types of errors, because each class fails in its own way on a wrong config.
        except Exception as error:
            if Path(self.repository).is_dir() or variant is not None:
                raise self._error(error) from error
            # On the Hub, request the names of files only if there are no plain weights
            names = names_of(self.repository, self.subfolder)
            if not names or any(is_weights(name, variant=None) for name in names):
                raise self._error(error) from error
            return self.load(choose_variant(names, None, path=self.path))

        # Missing weights would stay random, so raise an error
        problems = {name: keys for name, keys in loading.items() if keys and name in _PROBLEMS}
        if not problems:
            return net
        given = list(loading["unexpected_keys"])
        if plain_names(given, path=self.path) != {name: name for name in given}:
            return self._load_unwrapped(variant)
        name, keys = next((name, problems[name]) for name in _PROBLEMS if name in problems)
        raise UserError(
            f"the weights in '{self.path}' do not fit its config.json: "
            f"{name.replace('_', ' ')} ({len(keys)}, first {keys[0]})"
        )

    def _from_pretrained(self, variant: str | None) -> tuple[Any, dict[str, list[Any]]]:
        return self.cls.from_pretrained(
            self.repository,
            subfolder=self.subfolder,
            torch_dtype=self.dtype,
            use_safetensors=True,
            output_loading_info=True,
            variant=variant,
        )

    def _load_unwrapped(self, variant: str | None) -> Any:
        """Load the network from weights whose names have extra parts, such as `module.` of DDP."""
        folder = Path(self.repository)
        if not folder.is_dir():
            inside = "**/" if self.subfolder is None else f"{self.subfolder}/"
            folder = Path(snapshot_download(self.repository, allow_patterns=[f"{inside}*"]))
            folder = folder / (self.subfolder or "")
        files = [file for file in folder.iterdir() if is_weights(file.name, variant=variant)]
        tensors = {name: value for file in sorted(files) for name, value in load_file(file).items()}

        names = plain_names(tensors, path=self.path)
        say_removed(names, path=self.path)
        net = self.cls.from_config(_read_config(self.repository, self.subfolder))
        try:
            net.load_state_dict({names[name]: value for name, value in tensors.items()})
        except RuntimeError as error:
            raise self._error(error) from error
        return nn.Module.to(net, self.dtype).eval()

    def _error(self, error: Exception) -> UserError:
        return UserError(f"cannot load the weights in '{self.path}': {first_line(error)}")


_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def _is_of_folder(file: Path) -> bool:
    """Return whether a file holds the weights of the diffusers folder that it is in.

    The result is also False if the config.json beside the file is not the config of an autoencoder.
    The file is then loaded without the folder.
    """
    if not is_weights(file.name, variant=variant_of(file.name)):
        return False
    try:
        _class_of(_read_config(str(file.parent), None), file.parent)
    except UserError:
        return False
    return True


def _locate(path: str | Path) -> tuple[str, str | None]:
    """Return a local folder and None, or a repository on the Hub and its subfolder (or None)."""
    folder, parts = Path(path), str(path).split("/")
    on_disk = folder.exists() or (folder.parent.is_dir() and folder.parent != Path("."))
    may_be_on_hub = isinstance(path, str) and len(parts) >= 2 and all(parts) and parts[0] != "."
    # Do not ask the Hub for a mistyped path. Without a connection, the request takes half a minute.
    if on_disk or not may_be_on_hub or Path(parts[0]).exists() or _nearest_folder(folder):
        _check_folder(folder)
        return str(folder), None
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise UserError(f"no such model folder '{path}'{_near(path)}")
    if not path.is_dir():
        raise UserError(f"'{path}' is neither a folder nor a regular file")
    if not (path / "config.json").is_file():
        raise UserError(f"'{path}' holds no config.json, so it is no model folder{_hint(path)}")


def _hint(path: Path) -> str:
    """Return a hint at what the user may mean by a folder without config.json, or ""."""
    if (path / "adapter_config.json").is_file():
        return ". The folder holds an adapter of PEFT, which must be merged into its network first"
    inner = [path / name for name in _INNER if (path / name / "config.json").is_file()]
    files = sorted(path.glob("*.safetensors"))
    meant = inner[0] if inner else files[0] if len(files) == 1 else None
    return "" if meant is None else f"; did you mean '{meant}'?"


def _nearest_folder(path: Path) -> Path | None:
    """Return the model folder whose path is closest to a mistyped path, or None.

    Only those parts of the path that do not exist are replaced by similar names.
    """
    found = Path(path.anchor) if path.is_absolute() else Path(".")
    for part in path.parts[1:] if path.is_absolute() else path.parts:
        if not (found / part).exists():
            names = [inner.name for inner in found.iterdir()] if found.is_dir() else []
            part = next(iter(difflib.get_close_matches(part, names, n=1)), "")
            if not part:
                return None
        found = found / part
    return found if (found / "config.json").is_file() else None


def _near(path: Path) -> str:
    """Return a hint for a mistyped path, or "".

    The hint is the closest model folder, or else a name like the first wrong part of the path.
    """
    if (whole := _nearest_folder(path)) is not None:
        return f"; did you mean '{whole}'?"
    for part in [*reversed(path.parents), path]:
        if not part.exists():
            return nearest(part.name, (sibling.name for sibling in part.parent.iterdir()))
        if not part.is_dir():
            break
    return ""


def _read_config(repository: str, subfolder: str | None) -> dict[str, Any]:
    where = "/".join(filter(None, (repository, subfolder)))
    try:
        # This method reads the config of any class.
        config: Any = AutoencoderKL.load_config(repository, subfolder=subfolder)
        return config
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if Path(repository).is_dir():
            text = f"'{where}/config.json' is not the config of a diffusers model"
        else:
            text = (
                f"'{where}' is not a local folder, and cannot be read from the Hub as owner/name "
                "or owner/name/folder (in a pipeline: owner/name/vae): "
                f"{first_line(error)}{_near(Path(where))}"
            )
        raise UserError(text) from error


def _class_of(config: dict[str, Any], path: str | Path) -> Any:
    """Return the class that the config names, which must be an autoencoder."""
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
