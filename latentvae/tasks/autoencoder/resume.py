"""Where a run starts: anew, or from the newest checkpoint that verifies. "Resume" is the same
command again."""

import shutil
from collections.abc import Callable
from pathlib import Path

from latentvae.config.autoencoder import TrainConfig
from latentvae.distributed import from_main, is_main
from latentvae.engine.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_usable,
    set_aside,
    sweep_temporary,
    update_of,
)
from latentvae.engine.lock import LOCK_NAME
from latentvae.errors import UserError, nearest
from latentvae.tasks.autoencoder.base import BASE_NAME, Base
from latentvae.tasks.autoencoder.state import check_same_config, read_config, write_config

CONFIG_NAME = "config.yaml"
RUN_FILES = (  # all but the configuration, which is replaced: the folder stays a run's
    BASE_NAME,
    "log.jsonl",
    "samples",
    "logs",
    "checkpoint-*",
    "aside-checkpoint-*",
    "export",
)


def find_start(config: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, if any; nothing of a run is touched yet.

    Rank 0 looks; every rank gets its result or its error.
    """
    return _on_main(lambda: _find_start(config, folder))


def take_folder(
    config: TrainConfig, folder: Path, *, checkpoint: Path | None, base: Base | None
) -> None:
    """Make the folder that of this run, once all but a tracker that does not start could be
    refused: an earlier run goes if it is to, checkpoints after the one to go on from are set
    aside."""
    _on_main(lambda: _take_folder(config, folder, checkpoint=checkpoint, base=base))


def _on_main(work: Callable[[], Path | None]) -> Path | None:
    result: Path | UserError | None = None
    if is_main():
        try:
            result = work()
        except UserError as error:
            result = error
    result = from_main(result)
    if isinstance(result, UserError):
        raise result
    return result


def _find_start(config: TrainConfig, folder: Path) -> Path | None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir '{folder}' is a file; give a folder")
    sweep_temporary(folder)
    if config.run.overwrite_output_dir:
        _check_run(folder)
        return None
    checkpoint = _checkpoint(config.run.resume_from_checkpoint, folder)
    if checkpoint is not None:
        check_same_config(config, read_config(folder / CONFIG_NAME))
    return checkpoint


def _take_folder(
    config: TrainConfig, folder: Path, *, checkpoint: Path | None, base: Base | None
) -> None:
    if config.run.overwrite_output_dir:
        _delete_run(folder)
    for aside in set_aside(folder, after=update_of(checkpoint) if checkpoint else -1):
        print(f"{aside.name.removeprefix('aside-')} is not gone on from: it is now {aside.name}")
    print(f"going on from {checkpoint}" if checkpoint else f"starting anew in {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder / CONFIG_NAME)
        if base is not None:
            base.write(folder)
        else:
            (folder / BASE_NAME).unlink(missing_ok=True)  # of a fine-tuning that never began
    except OSError as error:
        raise UserError(f"output_dir '{folder}' cannot be written: {error.strerror}") from error


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


def _check_run(folder: Path) -> None:
    """Refuse a folder that has something in it, but no run."""
    if folder.is_dir() and any(path.name != LOCK_NAME for path in folder.iterdir()):
        read_config(folder / CONFIG_NAME)


def _delete_run(folder: Path) -> None:
    """Delete what a run writes; all else in the folder stays."""
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            linked = path.is_symlink()  # what it points to is not the run's
            shutil.rmtree(path) if path.is_dir() and not linked else path.unlink()
