"""Export a finished run once and record the export in the log, or export a checkpoint."""

from pathlib import Path

from latentvae.engine.checkpoint_content import load_for_export
from latentvae.engine.checkpoint_files import load_checkpoint, newest_usable
from latentvae.engine.log import append_row, read_rows
from latentvae.engine.processes import end_accelerator, start_accelerator
from latentvae.engine.task import Task
from latentvae.engine.training import Training, build_training
from latentvae.errors import UserError


def export(training: Training) -> Path:
    """Export the averaged weights, log the export and return its folder.

    All ranks must call this function.
    """
    task, update = training.task, training.progress.update
    out = training.folder / "export"
    with training.evaluating():
        values = task.export(out, update=update, folder=training.folder)
    if training.accelerator.is_main_process:
        row = {"update": update, "export/update": update, **values, **task.export_options()}
        append_row(training.folder / "log.jsonl", row)
    return out


def is_exported(task: Task, folder: Path, *, update: int) -> bool:
    """Return whether a run has exported its weights after `update` with the task's export options.

    Args:
        task: the task, whose options are compared with those of the last export.
        folder: the run's folder.
        update: number of updates done.
    """
    exports = [row for row in read_rows(folder / "log.jsonl") if "export/update" in row]
    wanted = {"export/update": update} | task.export_options()
    same = exports and all(exports[-1].get(name) == value for name, value in wanted.items())
    return bool(same) and task.has_export(folder / "export")


def export_checkpoint(task: Task, folder: Path, out: Path) -> int:
    """Export the newest usable checkpoint of a run, and return its number of updates.

    The data of the run must still exist. Nothing in the run's folder changes. The run may have used
    another precision and another number of processes than this export.

    Args:
        task: the task with the options of the run, before a call of its method `open`.
        folder: the run's folder.
        out: the export's folder. An existing export in `out` is replaced.

    Raises:
        UserError: there is no checkpoint that can be used, or the run's data no longer exist.
    """
    checkpoint, faults = newest_usable(folder)
    if checkpoint is None:
        reasons = "".join(f". {fault}" for fault in faults)
        raise UserError(f"'{folder}' has no checkpoint that can be used{reasons}")

    # the task, in full precision
    task.config = task.config.with_changes({"run": {"mixed_precision": "no"}})
    task.check()
    task.open()
    accelerator = start_accelerator(task.config.run, folder)
    try:
        training = build_training(task, folder=folder, accelerator=accelerator, resumed=True)
        load_for_export(training, load_checkpoint(checkpoint))
        update = training.progress.update
        with training.evaluating():
            task.export(out, update=update, folder=folder)
    finally:
        end_accelerator(accelerator)
    return update
