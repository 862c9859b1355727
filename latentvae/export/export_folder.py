"""Write an export's folder completely or not at all, load it, and recognise such a folder."""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from latentvae.errors import UserError
from latentvae.models import FAMILIES, Network, family_of


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Raise UserError unless `out` is new, empty, or an export that `overwrite` may replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_export(out):
        raise UserError(f"'{out}' exists and is not an export. Give another folder.")
    if not overwrite:
        raise UserError(f"'{out}' holds an export. Give another folder, or overwrite the export.")


def is_export(folder: Path) -> bool:
    """Return whether a folder holds an autoencoder, or a model with a model card of latentvae."""
    return _has_card(folder) or _is_autoencoder(folder)


def _has_card(folder: Path) -> bool:
    """Return whether a folder holds a network or a pipeline with a model card of latentvae."""
    if not any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        return False
    try:
        head = (folder / "README.md").read_text(encoding="utf-8").split("---")[1:2]
    except (OSError, UnicodeDecodeError):
        return False
    return bool(head) and "latentvae" in head[0]


def _is_autoencoder(folder: Path) -> bool:
    """Return whether a folder's config.json names a class of network that latentvae exports."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = {cls.__name__ for family in FAMILIES.values() for cls in family.exports}
    return isinstance(config, dict) and config.get("_class_name") in names


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `out` at the end, or deleted on error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.writing-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()  # tempfile would ignore the umask
    try:
        yield folder
        _settle(folder)
        _swap(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give every file the permissions of the umask, and sync the files to the disk.

    Without this step, the files that safetensors writes would have the permissions 0600.
    """
    mode = (folder / "README.md").stat().st_mode & 0o777
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(mode)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _swap(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`. Delete an earlier `out` only after the renaming."""
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_back(folder: Path, cls: type[Any]) -> Any:
    """Return the network that `cls` loads from an export's folder, on the CPU, in eval mode.

    Raises:
        RuntimeError: the names or shapes of the weights in the folder do not match the network.
    """
    net, info = cls.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    problems = {kind: keys for kind, keys in info.items() if keys}
    if problems:
        raise RuntimeError(f"the export cannot be loaded completely: {problems}")
    # The weights are a memory map of the file, whose alignment can change the rounding of sums.
    return copy.deepcopy(net)


def probes(net: Network, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Return two test images: the first image of `probe`, and this image padded to another size.

    The padded size is not divisible by the downsampling factor f, unless the network needs
    divisible sizes.
    """
    multiple = family_of(net).side_multiple(net)
    more = (0, multiple, 0, 0) if multiple > 1 else (0, 3, 0, 1)
    return probe[:1], F.pad(probe[:1], more, mode="replicate")
