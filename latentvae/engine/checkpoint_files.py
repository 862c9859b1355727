"""Write and read the folder of a checkpoint, which is either complete or absent.

    checkpoint-<update>/  *.safetensors (see `checkpoint_content`)  state.json  manifest.json

All files are written to a temporary folder. The manifest, which holds the sha256 and the size of
each file, is written last. Then files and folder are fsynced, and the folder is renamed to its
final name. Older checkpoints are deleted only after the rename. A checkpoint is loaded only if its
files match the manifest. A checkpoint contains no pickle: tensors are stored as safetensors, all
else as JSON.
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
    """The content of a checkpoint.

    Attributes:
        tensors: for each safetensors file, its tensors by name.
        values: the JSON values in `state.json`.
        update: number of updates done, taken from the folder's name. None if the snapshot was not
            read from a folder.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    update: int | None = None


def save_checkpoint(run: Path, snapshot: Snapshot, *, update: int, keep: int) -> Path:
    """Write `checkpoint-<update>` into the folder `run`. Return the checkpoint's folder.

    Afterwards all checkpoints except the newest `keep` are deleted. An existing checkpoint of this
    update is an AssertionError and is never overwritten. Overwriting would first delete the
    checkpoint, and a kill at this moment would leave no checkpoint of this update. If writing
    fails, for example on a full disk, the incomplete checkpoint is deleted.
    """
    final = run / f"{PREFIX}{update}"
    assert not final.exists(), f"{final} is there already"  # a resume renames later checkpoints

    # write
    temporary = run / f"{PREFIX}{update}.tmp-{os.getpid()}"
    try:
        _write(temporary, snapshot, update=update)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(final)
    _fsync(run)

    # Delete old checkpoints. Each is renamed first, so that a kill leaves no half-deleted
    # checkpoint under a checkpoint's name.
    for old in [path for path in checkpoints(run) if update_of(path) <= update][:-keep]:
        doomed = old.with_name(f"{old.name}.tmp-{os.getpid()}")
        old.rename(doomed)
        shutil.rmtree(doomed)
    return final


def _write(temporary: Path, snapshot: Snapshot, *, update: int) -> None:
    """Write all files of a checkpoint to the disk, the manifest last."""
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
    """Return the content of a checkpoint whose files match its manifest.

    Raises:
        UserError: the checkpoint is incomplete or damaged. The message names the checkpoint.
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
    """Return the checkpoint folders of a run, sorted by the number of updates, oldest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if _is_number(path.name[len(PREFIX) :])]
    return sorted(found, key=update_of)


def update_of(checkpoint: Path) -> int:
    """Return the number of updates that were done when a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(PREFIX))


def set_aside(run: Path, *, after: int) -> list[Path]:
    """Rename all checkpoints with more than `after` updates to `aside-...`. Return the new paths.

    Older folders with the new names are deleted.
    """
    renamed = []
    for path in checkpoints(run):
        if update_of(path) > after:
            aside = run / f"aside-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            renamed.append(path.rename(aside))
    return renamed


def newest_usable(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint, and a message about each newer, invalid checkpoint."""
    faults = []
    for folder in reversed(checkpoints(run)):
        fault = _fault(folder)
        if not fault:
            return folder, faults
        faults.append(f"{folder.name} is skipped: {fault}")
    return None, faults


def half_written(run: Path) -> list[Path]:
    """Return the temporary folders that killed saves and exports have left behind."""
    patterns = (f"{PREFIX}*.tmp-*", ".export.writing-*", ".export.replaced-*")
    return [path for pattern in patterns for path in sorted(run.glob(pattern))]


def sweep_temporary(run: Path) -> None:
    """Delete the temporary folders that killed saves and exports have left behind."""
    for path in half_written(run):
        shutil.rmtree(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return an optimizer's state as tensors named `<parameter name>|<key>`.

    The optimizer's settings and learning rates are left out, because the run's options set them.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    state = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            state[f"{names[parameter]}|{key}"] = torch.as_tensor(value)
    return state


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Load an optimizer's state that `optimizer_tensors` returned.

    Raises:
        UserError: a tensor belongs to no parameter of the module, or has another shape.
    """
    parameters = dict(module.named_parameters())
    for joined, value in tensors.items():
        name, _, key = joined.rpartition("|")
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
            raise UserError(f"the checkpoint is not of this configuration: '{joined}'")
        # A moment of AdamW needs its parameter's memory format, because the fused update relies on
        # it. Files do not store the memory format.
        like = (
            torch.empty_like(parameter)
            if value.shape == parameter.shape
            else torch.empty_like(value)
        )
        optimizer.state[parameter][key] = like.to(parameter.device).copy_(value)


def follow_umask(folder: Path) -> None:
    """Set file modes by the umask. safetensors writes files that only the owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _fault(folder: Path) -> str:
    """Return why a checkpoint cannot be used, or an empty string."""
    if not (folder / "manifest.json").exists():
        return "manifest.json is missing"

    try:
        manifest = read_json(folder / "manifest.json")
        files = manifest["files"]
        if manifest["update"] != update_of(folder):
            return (
                f"manifest.json is of update {str(manifest['update'])[:20]}, but the folder's name "
                "says another update"
            )
        present = {path.name for path in folder.glob("*.safetensors")} | {"state.json"}
        if not present <= files.keys():
            return f"{min(present - files.keys())} is not in manifest.json"
        for name, expected in files.items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if Path(name).name != name or not (folder / name).is_file():
                return f"{name} is not a file of a checkpoint"
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
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": path.stat().st_size, "sha256": digest}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
