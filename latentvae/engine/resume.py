"""Start a run from scratch, or from a checkpoint: by default, from the newest valid one.

Running the same command again resumes a run.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from latentvae.config.presets import parse
from latentvae.config.run_config import JobConfig, flat
from latentvae.distributed import from_main, is_main
from latentvae.engine.checkpoint_files import (
    checkpoints,
    load_checkpoint,
    newest_usable,
    set_aside,
    sweep_temporary,
    update_of,
)
from latentvae.engine.lock import LOCK_NAME
from latentvae.engine.processes import fastest_precision
from latentvae.engine.task import Task
from latentvae.errors import UserError, nearest
from latentvae.files import read_yaml

CONFIG_NAME = "config.yaml"
# config.yaml is not in this list, because it marks the folder as a run until it is replaced.
RUN_FILES = (
    "log.jsonl",
    "samples",
    "logs",
    "checkpoint-*",
    "aside-checkpoint-*",
    "export",
)

Config = TypeVar("Config", bound=JobConfig)


def find_start(asked: JobConfig, folder: Path) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run.

    Rank 0 searches, and every rank gets the same result or error. Only temporary folders that
    killed saves and exports have left behind are deleted. Nothing else is changed.

    Raises:
        UserError: options that must not change differ from those of the run in the folder, a named
            checkpoint cannot be used, or `overwrite_output_dir` is set and the folder holds files
            but no run.
    """
    return _on_main(lambda: _find_start(asked, folder))


def take_folder(task: Task, asked: JobConfig, folder: Path, *, checkpoint: Path | None) -> None:
    """Prepare the folder for this run, after all checks except the start of the tracker.

    An earlier run is deleted if `overwrite_output_dir` is set. The run resumes from `checkpoint`,
    and all later checkpoints are renamed. If `checkpoint` is None, all checkpoints are renamed. The
    options `asked` are saved as config.yaml.
    """
    _on_main(lambda: _take_folder(task, asked, folder, checkpoint=checkpoint))


def write_config(config: JobConfig, path: Path) -> None:
    """Write a configuration file completely or not at all."""
    temporary = path.with_suffix(".yaml.tmp")
    temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    temporary.replace(path)


def read_config(path: Path, schema: type[Config]) -> Config:
    """Return the configuration with which a run was started.

    Raises:
        UserError: the folder or the file does not belong to a run.
    """
    if not path.is_file():
        raise UserError(f"'{path.parent}' is not a run: it has no {path.name}")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is not the configuration of a run")
    if not values.keys() >= set(schema.model_fields):
        raise UserError(
            f"'{path}' is not the configuration of a run of this kind. Its sections are "
            f"{', '.join(map(str, values))}."
        )
    return parse(values, schema, source=str(path))


def settle_precision(config: Config, folder: Path) -> Config:
    """Return the options with a precision in place of the value `auto` of `mixed_precision`.

    An existing run in `folder` keeps its precision. The precision None means the precision that the
    launcher sets. A new run gets the precision that is fastest on this machine, and its config.yaml
    records this precision.
    """
    if config.run.mixed_precision != "auto":
        return config
    if not config.run.overwrite_output_dir and (folder / CONFIG_NAME).is_file():
        chosen = read_config(folder / CONFIG_NAME, type(config)).run.mixed_precision
    else:
        chosen = fastest_precision()
    return config.with_changes({"run": {"mixed_precision": chosen}})


def check_same_config(now: JobConfig, then: JobConfig) -> None:
    """Raise UserError if options that change the result differ from those of the run.

    The error names the options.

    Args:
        now: the options of this call.
        then: the options with which the run was started.
    """
    new, old = flat(now), flat(then)
    may_change = now.may_change(then)
    changed = [name for name in new if new[name] != old.get(name) and name not in may_change]
    if changed:
        listed = ", ".join(f"{name} ({old.get(name)} then, {new[name]} now)" for name in changed)
        folder = now.run.output_dir or then.run.output_dir or ""
        raise UserError(
            f"the run in '{folder}' was started with other options: {listed}. "
            "Give the old options, or another output_dir. Or give --overwrite_output_dir to delete "
            f"the run and start from scratch.{now.how_to_branch(then, folder=folder)}"
        )


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


def _find_start(config: JobConfig, folder: Path) -> Path | None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir '{folder}' is a file. Give a folder.")
    sweep_temporary(folder)
    if config.run.overwrite_output_dir:
        _check_run(folder, type(config))
        return None
    checkpoint = _checkpoint(config.run.resume_from_checkpoint, folder)
    if checkpoint is not None:
        check_same_config(config, read_config(folder / CONFIG_NAME, type(config)))
    return checkpoint


def _take_folder(task: Task, asked: JobConfig, folder: Path, *, checkpoint: Path | None) -> None:
    if asked.run.overwrite_output_dir:
        _delete_run(folder, (*task.files, *RUN_FILES))
    for aside in set_aside(folder, after=update_of(checkpoint) if checkpoint else -1):
        print(f"{aside.name.removeprefix('aside-')} is not used and was renamed to {aside.name}")
    print(f"resuming from {checkpoint}" if checkpoint else f"starting a new run in {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(asked, folder / CONFIG_NAME)
        task.write_files(folder)
    except OSError as error:
        raise UserError(f"output_dir '{folder}' cannot be written: {error.strerror}") from error


def _checkpoint(wanted: str, folder: Path) -> Path | None:
    """Return the checkpoint that `wanted` names (for `latest`, the newest valid one or None).

    Raises:
        UserError: a named checkpoint is not a checkpoint of this run, or is damaged.
    """
    if wanted == "latest":
        if found := checkpoints(folder):
            print(f"verifying {found[-1]}", flush=True)
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


def _check_run(folder: Path, schema: type[JobConfig]) -> None:
    """Raise UserError if a folder contains files, but no run."""
    if folder.is_dir() and any(path.name != LOCK_NAME for path in folder.iterdir()):
        read_config(folder / CONFIG_NAME, schema)


def _delete_run(folder: Path, patterns: tuple[str, ...]) -> None:
    """Delete the files of a run. Other files in the folder stay."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            linked = path.is_symlink()  # its target does not belong to the run
            shutil.rmtree(path) if path.is_dir() and not linked else path.unlink()
