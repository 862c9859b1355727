"""Export a finished run once, and record the export in the log."""

from pathlib import Path

from latentvae.engine.log import append_row, read_rows
from latentvae.engine.task import Task
from latentvae.engine.training import Training


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
    """Return whether `folder` has an export of the same update with the same options."""
    exports = [row for row in read_rows(folder / "log.jsonl") if "export/update" in row]
    wanted = {"export/update": update} | task.export_options()
    same = exports and all(exports[-1].get(name) == value for name, value in wanted.items())
    return bool(same) and task.has_export(folder / "export")
