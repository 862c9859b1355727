"""Write the folder of an export completely or not at all, load it back, and recognise it."""

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
    """Check that `out` is new or empty, or an export that `overwrite` allows to replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_export(out):
        raise UserError(f"'{out}' exists and is not an export. Give another folder.")
    if not overwrite:
        raise UserError(f"'{out}' holds an export. Give another folder, or overwrite it.")


def is_export(folder: Path) -> bool:
    """Return whether a folder's config.json names a network that can be exported here."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = {cls.__name__ for family in FAMILIES.values() for cls in family.exports}
    return isinstance(config, dict) and config.get("_class_name") in names


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Yield a temporary folder. Rename it to `out` at the end, or delete it on an error."""
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
    """Give every file the umask's mode (safetensors writes 0600) and sync it to the disk."""
    mode = (folder / "README.md").stat().st_mode & 0o777
    for file in folder.iterdir():
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
    """Load an export with `cls`, on the CPU, in eval mode. Raise RuntimeError if keys differ."""
    net, info = cls.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    problems = {kind: keys for kind, keys in info.items() if keys}
    if problems:
        raise RuntimeError(f"the export cannot be loaded completely: {problems}")
    # The weights are a memory map of the file, whose alignment can change the rounding of sums.
    return copy.deepcopy(net)


def probes(net: Network, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first image, and the same image padded to another size.

    The other size is not divisible by f, unless the network needs divisible sizes.
    """
    multiple = family_of(net).side_multiple(net)
    more = (0, multiple, 0, 0) if multiple > 1 else (0, 3, 0, 1)
    return probe[:1], F.pad(probe[:1], more, mode="replicate")
