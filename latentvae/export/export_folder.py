"""The folder of an export: written whole or not at all, read back, and told from others."""

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
    """Refuse what is no export, and an export that is not to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_export(out):
        raise UserError(f"'{out}' exists and is not an export; name another folder")
    if not overwrite:
        raise UserError(f"'{out}' holds an export; name another folder, or ask to overwrite it")


def is_export(folder: Path) -> bool:
    """Whether a folder's config.json names a network that is exported here."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = {cls.__name__ for family in FAMILIES.values() for cls in family.exports}
    return isinstance(config, dict) and config.get("_class_name") in names


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, or disappears."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.writing-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()  # by the umask, unlike tempfile's
    try:
        yield folder
        _settle(folder)
        _swap(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give every file the umask's mode (safetensors writes 0600) and bring it to the disk."""
    mode = (folder / "README.md").stat().st_mode & 0o777
    for file in folder.iterdir():
        file.chmod(mode)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _swap(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an earlier `out` goes only when the new one stands."""
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
    """What `cls` loads from an export, whole or not at all; on the CPU, in eval mode."""
    net, info = cls.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    problems = {kind: keys for kind, keys in info.items() if keys}
    if problems:
        raise RuntimeError(f"the export is not loaded whole: {problems}")
    return copy.deepcopy(net)  # out of the file's memory map, whose alignment can change sums


def probes(net: Network, probe: Tensor) -> tuple[Tensor, Tensor]:
    """The first image, and it at another size: one that f does not divide, where the network takes
    such."""
    multiple = family_of(net).side_multiple(net)
    more = (0, multiple, 0, 0) if multiple > 1 else (0, 3, 0, 1)
    return probe[:1], F.pad(probe[:1], more, mode="replicate")
