"""Checkpoints: a folder is complete or it is not there.

    checkpoint-<update>/  *.safetensors (see `snapshot`)  state.json  manifest.json

Everything is written to a temporary folder, the manifest (sha256 and size of each file) last; files
and folder are fsynced and the folder renamed. Readers take only folders whose manifest verifies.
Older ones are deleted only after that. No pickle: tensors are safetensors, the rest JSON.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentvae.errors import UserError
from latentvae.files import read_json

PREFIX = "checkpoint-"


@dataclass
class Snapshot:
    """What a checkpoint holds.

    Attributes:
        tensors: by file and name.
        values: plain ones, of `state.json`.
        update: by the folder's name, of one that was read.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    update: int | None = None


def save_checkpoint(run: Path, snapshot: Snapshot, *, update: int, keep: int) -> Path:
    """Write ``checkpoint-<update>`` into the folder ``run``, then delete all but the newest
    ``keep``. None is written over: a kill between deleting one and renaming another would leave
    neither. What a full disk cuts short is deleted."""
    final = run / f"{PREFIX}{update}"
    assert not final.exists(), f"{final} is there already"  # a resume sets such ones aside
    temporary = run / f"{PREFIX}{update}.tmp-{os.getpid()}"
    try:
        _write(temporary, snapshot, update=update)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(final)
    _fsync(run)
    for old in [path for path in checkpoints(run) if update_of(path) <= update][:-keep]:
        doomed = old.with_name(f"{old.name}.tmp-{os.getpid()}")
        old.rename(doomed)  # or a kill would leave half a checkpoint under its name
        shutil.rmtree(doomed)
    return final


def _write(temporary: Path, snapshot: Snapshot, *, update: int) -> None:
    """All files of a checkpoint, onto the disk, the manifest last."""
    temporary.mkdir(parents=True)
    for name, tensors in snapshot.tensors.items():
        path = temporary / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
    (temporary / "state.json").write_text(json.dumps(snapshot.values, indent=1))
    manifest = {
        "update": update,
        "files": {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())},
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    follow_umask(temporary)
    for path in (*temporary.iterdir(), temporary):
        _fsync(path)


def load_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint whose files are what its manifest says.

    Raises:
        UserError: incomplete or damaged; names the file.
    """
    fault = _fault(folder)
    if fault:
        raise UserError(f"checkpoint '{folder}' cannot be used: {fault}")
    try:
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint '{folder}' cannot be used: {error}") from error
    values = read_json(folder / "state.json")
    if not isinstance(values, dict):
        raise UserError(f"checkpoint '{folder}' cannot be used: state.json is damaged")
    return Snapshot(tensors=tensors, values=values, update=update_of(folder))


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first (by update, not by name)."""
    found = [path for path in run.glob(f"{PREFIX}*") if _is_number(path.name[len(PREFIX) :])]
    return sorted(found, key=update_of)


def update_of(checkpoint: Path) -> int:
    """The updates done when it was saved."""
    return int(checkpoint.name.removeprefix(PREFIX))


def set_aside(run: Path, *, after: int) -> list[Path]:
    """Rename the checkpoints after an update, from which the run does not go on; gives the new
    names."""
    renamed = []
    for path in checkpoints(run):
        if update_of(path) > after:
            aside = run / f"aside-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            renamed.append(path.rename(aside))
    return renamed


def newest_usable(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not."""
    faults = []
    for folder in reversed(checkpoints(run)):
        fault = _fault(folder)
        if not fault:
            return folder, faults
        faults.append(f"{folder.name} is passed over: {fault}")
    return None, faults


def half_written(run: Path) -> list[Path]:
    """What killed saves and exports left behind."""
    patterns = (f"{PREFIX}*.tmp-*", ".export.writing-*", ".export.replaced-*")
    return [path for pattern in patterns for path in sorted(run.glob(pattern))]


def sweep_temporary(run: Path) -> None:
    """Delete what killed saves and exports left behind."""
    for path in half_written(run):
        shutil.rmtree(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """An optimiser's state as ``<parameter name>|<key>`` -> tensor; settings and learning rates are
    the config's."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    state = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            state[f"{names[parameter]}|{key}"] = torch.as_tensor(value)
    return state


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """The reverse of `optimizer_tensors`.

    Raises:
        UserError: of a parameter that the module does not have, or of another shape.
    """
    parameters = dict(module.named_parameters())
    for joined, value in tensors.items():
        name, _, key = joined.rpartition("|")
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
            raise UserError(f"the checkpoint is not of this configuration: '{joined}'")
        # A moment keeps its parameter's memory format, which the fused update relies on and a file
        # does not hold.
        like = (
            torch.empty_like(parameter)
            if value.shape == parameter.shape
            else torch.empty_like(value)
        )
        optimizer.state[parameter][key] = like.to(parameter.device).copy_(value)


def follow_umask(folder: Path) -> None:
    """Give files the modes the umask asks for; safetensors leaves them readable by their owner
    alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _fault(folder: Path) -> str:
    """Why a checkpoint cannot be used, or an empty string."""
    if not (folder / "manifest.json").exists():
        return "manifest.json is missing"
    try:
        manifest = read_json(folder / "manifest.json")
        files = manifest["files"]
        if manifest["update"] != update_of(folder):
            return f"manifest.json is of update {str(manifest['update'])[:20]}"
        present = {path.name for path in folder.glob("*.safetensors")} | {"state.json"}
        if not present <= files.keys():
            return f"{min(present - files.keys())} is not in manifest.json"
        for name, expected in files.items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if Path(name).name != name or not (folder / name).is_file():
                return f"{name} is no file of a checkpoint"
            if _fingerprint(folder / name) != expected:
                return f"{name} is not what was saved (size or sha256 differs)"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):  # a UserError is a ValueError
        return "manifest.json is damaged"
    return ""


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
