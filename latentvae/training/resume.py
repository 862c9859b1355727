"""Where a run starts: anew, or from the newest checkpoint that verifies. "Resume" is the same
command again."""

import shutil
from pathlib import Path

from latentvae.distributed import from_main, is_main
from latentvae.errors import UserError, nearest
from latentvae.training.base import BASE_NAME
from latentvae.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_usable,
    set_aside,
    sweep_temporary,
    update_of,
)
from latentvae.training.config import TrainConfig
from latentvae.training.lock import LOCK_NAME
from latentvae.training.state import check_same_config, read_config, write_config

CONFIG_NAME = "config.yaml"
RUN_FILES = (
    CONFIG_NAME,
    BASE_NAME,
    "log.jsonl",
    "samples",
    "logs",
    "checkpoint-*",
    "aside-checkpoint-*",
    "export",
)


def prepare_folder(config: TrainConfig, folder: Path) -> Path | None:
    """Make the run's folder and find the checkpoint to go on from, if any.

    Rank 0 looks and touches; every rank gets its result or its error.
    """
    result: Path | UserError | None = None
    if is_main():
        try:
            result = _find_start(config, folder)
        except UserError as error:
            result = error
    result = from_main(result)
    if isinstance(result, UserError):
        raise result
    return result


def _find_start(config: TrainConfig, folder: Path) -> Path | None:
    saved = folder / CONFIG_NAME
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir '{folder}' is a file; give a folder")
    if config.run.overwrite_output_dir:
        _delete_run(folder)
    sweep_temporary(folder)
    checkpoint = _checkpoint(config.run.resume_from_checkpoint, folder)
    if checkpoint is not None:
        check_same_config(config, read_config(saved))
    for aside in set_aside(folder, after=update_of(checkpoint) if checkpoint else -1):
        print(f"{aside.name.removeprefix('aside-')} is not gone on from: it is now {aside.name}")
    print(f"going on from {checkpoint}" if checkpoint else f"starting anew in {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, saved)
    except OSError as error:
        raise UserError(f"output_dir '{folder}' cannot be written: {error.strerror}") from error
    return checkpoint


def _checkpoint(wanted: str, folder: Path) -> Path | None:
    """`latest` may be none; a named one must be there and whole."""
    if wanted == "latest":
        checkpoint, faults = newest_usable(folder)
        for fault in faults:
            print(fault)
        return checkpoint
    path = folder / Path(wanted).name
    elsewhere = Path(wanted).name != wanted and Path(wanted).resolve() != path.resolve()
    if elsewhere or path not in checkpoints(folder):
        names = [found.name for found in checkpoints(folder)]
        raise UserError(
            f"resume_from_checkpoint '{wanted}' is not a checkpoint of '{folder}', which "
            f"has {', '.join(names) or 'none'}{nearest(path.name, names)}"
        )
    load_checkpoint(path)
    return path


def _delete_run(folder: Path) -> None:
    """Delete what a run writes; all else in the folder stays, and a folder without a run is
    refused."""
    if not folder.is_dir() or not any(path.name != LOCK_NAME for path in folder.iterdir()):
        return
    read_config(folder / CONFIG_NAME)
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            linked = path.is_symlink()  # what it points to is not the run's
            shutil.rmtree(path) if path.is_dir() and not linked else path.unlink()
