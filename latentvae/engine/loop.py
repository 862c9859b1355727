"""Run the training loop: updates, and between them log rows, checkpoints and validations.

The loop is the same for any task and any number of ranks.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latentvae.compute.memory import keep_freed_memory
from latentvae.config.presets import checked
from latentvae.config.run_config import JobConfig, flat
from latentvae.distributed import barrier, from_main, gather_objects, is_main
from latentvae.engine.checkpoint_content import restore, take_snapshot
from latentvae.engine.checkpoint_files import PREFIX, load_checkpoint, save_checkpoint
from latentvae.engine.data_wait import DataWait
from latentvae.engine.failures import explained
from latentvae.engine.finished_export import export, is_exported
from latentvae.engine.lock import locked
from latentvae.engine.log import MeanWindow, RunLog, Window, sample_path
from latentvae.engine.non_finite import describe
from latentvae.engine.plan import plan, warnings
from latentvae.engine.processes import end_accelerator, start_accelerator
from latentvae.engine.publishing import check_push, push_export, repository
from latentvae.engine.resume import find_start, settle_precision, take_folder
from latentvae.engine.run_options import check_options
from latentvae.engine.schedule import learning_rate
from latentvae.engine.signals import Interrupt
from latentvae.engine.task import Task
from latentvae.engine.tracker import close_tracker, start_tracker
from latentvae.engine.training import Training, build_training
from latentvae.engine.updates import UpdateResult, Updates
from latentvae.errors import RunError

SILENT_SECONDS = 10.0  # a line announces a validation if the last validation took longer


class Stopped(Exception):
    """Raised after a signal has asked the run to stop and the run has saved a checkpoint."""

    def __init__(self, signal: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by signal {signal} and saved {checkpoint}. The same command resumes "
            "from this checkpoint."
        )
        self.signal = signal


def train(task: Task) -> Path:
    """Train, validate and export. Return the export's folder.

    Another call with the same options resumes from the newest checkpoint, unless the option
    `overwrite_output_dir` or `resume_from_checkpoint` asks for another start.

    Raises:
        UserError: an option, a path or the data is wrong. Most such faults are found before the
            first update.
        RunError: too many updates in a row were skipped, or the machine ended the run, for example
            by a full disk, too little memory or a dead process.
        UploadError: the run is finished and exported, but the upload to the Hub failed.
        Stopped: a signal stopped the run, which first saved a checkpoint.
    """
    # all checks that need no other processes
    task.config = checked(task.config)
    task.check()
    folder = check_options(task.config.run)
    task.config = settle_precision(task.config, folder)
    task.open()

    # the run
    asked = task.config
    accelerator = start_accelerator(asked.run, folder)
    try:
        keep_freed_memory(accelerator.device)
        task.config = asked.for_processes(accelerator.num_processes)
        options = task.config.run
        task.check_processes(accelerator.num_processes)
        if options.push_to_hub:
            check_push(repository(options.hub_model_id, folder), private=options.hub_private_repo)
        with explained(task), locked(folder):
            update = _run(task, asked, folder=folder, accelerator=accelerator)
    finally:
        close_tracker(accelerator)
        for learner in task.learners.values():
            learner.prepared = learner.module  # DDP must not outlive the process group
        end_accelerator(accelerator)

    # Upload the export. The other ranks do not wait, so that none of them times out.
    out = folder / "export"
    if options.push_to_hub and accelerator.is_main_process:
        push_export(
            out,
            repo_id=repository(options.hub_model_id, folder),
            private=options.hub_private_repo,
            message=f"{task.title} after update {update:,}",
        )
    return out


def _run(task: Task, asked: JobConfig, *, folder: Path, accelerator: Accelerator) -> int:
    """Start or resume the run in `folder`. Return the number of updates done.

    Args:
        task: what to train. The task's options are already converted for this number of processes.
        asked: the options before that conversion. These options are saved in the run's folder.
        folder: the run's folder.
        accelerator: knows the processes.
    """
    # build, and load the newest checkpoint if there is one
    checkpoint = find_start(asked, folder)
    training = build_training(
        task, folder=folder, accelerator=accelerator, resumed=checkpoint is not None
    )
    window: Window = {}
    if checkpoint is not None:
        window = restore(training, load_checkpoint(checkpoint))

    # The last checks. Then the folder belongs to this run.
    unfinished = training.progress.update < task.config.run.max_train_steps
    if unfinished:
        task.check_ready()
    take_folder(task, asked, folder, checkpoint=checkpoint)
    if not unfinished:
        done = training.progress.update
        accelerator.print(f"the run in '{folder}' has made all its {done:,} updates")
        if from_main(is_exported(task, folder, update=done)):
            return done

    _train(training, window)
    export(training)
    return training.progress.update


def _train(training: Training, window: Window) -> None:
    # batches and plan
    task, options = training.task, training.config.run
    start = training.progress.update
    loader = task.batches(start_step=training.progress.micro_step)
    training.accelerator.print(plan(training))
    for warning in warnings(training):
        training.accelerator.print(f"warning: {warning}")

    # log and clock
    start_tracker(
        training.accelerator,
        options.report_to,
        folder=training.folder,
        project=options.tracker_project_name,
        options=flat(training.config),
    )
    waiting = DataWait(
        loader,
        num_workers=task.num_workers,
        num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        unit=task.unit,
        advice=task.data_advice,
    )

    log = RunLog(
        training.folder,
        training.accelerator,
        start=start,
        total=options.max_train_steps,
        items_per_update=training.items_per_update,
        unit=task.unit,
        shown=task.shown,
        waiting=waiting,
    )

    # updates, until the end or a signal
    progress = training.progress
    next_update = (lambda: progress.update + 1) if is_main() else None
    with Interrupt(next_update) as interrupt, contextlib.closing(log):
        loop = _Loop(training, window, log=log, interrupt=interrupt)
        try:
            loop.catch_up()
            loop.go(waiting)
        finally:
            if (summary := task.summary()) is not None:
                log.say(summary)


class _Loop:
    """The training loop: updates until the end or a signal, with logs, saves and validations."""

    def __init__(
        self, training: Training, window: Window, *, log: RunLog, interrupt: Interrupt
    ) -> None:
        self.training, self.task = training, training.task
        self.log = log
        self.updates = Updates(training, requested=lambda: interrupt.requested)
        self.window = MeanWindow(training.accelerator.device, saved=window)
        self._validation_seconds = math.inf  # duration of the last validation
        self.task.say = log.say
        self.task.begin(training.progress.update)

    def go(self, batches: Iterator[Any]) -> None:
        options, progress = self.training.config.run, self.training.progress
        while progress.update < options.max_train_steps:
            result = self.updates.make(batches)
            self._take(result)
            last = progress.update == options.max_train_steps
            self.log.step()

            if progress.update % options.log_steps == 0 or last:
                self._row()
            if progress.update % options.checkpointing_steps == 0 or last or result.signal:
                checkpoint = self._save()
                if result.signal and not last:
                    raise Stopped(result.signal, checkpoint)
            if self._validation_is_due():
                self._validate()

    def catch_up(self) -> None:
        """Make the first validation, or a validation that a kill or a signal prevented.

        The first validation comes before the first update.

        A checkpoint is saved before the validation of the same update, so a kill or a signal
        between the two prevents the validation. If the log already has the validation of this
        update, the task gets the logged results, and no validation is made.
        """
        validation = from_main(self.log.validation)
        if validation is not None:
            self._validated(validation)
        elif self._validation_is_due():
            self._validate()

    def _validation_is_due(self) -> bool:
        options, update = self.training.config.run, self.training.progress.update
        return update % options.validation_steps == 0 or update == options.max_train_steps

    def _take(self, result: UpdateResult) -> None:
        """Add the values of an update to the next log row, or report that the update was skipped.

        Raises:
            RunError: `max_skipped_updates` updates in a row were skipped.
        """
        if result.finite:
            for values in result.values:
                self.window.add(values)
            return

        progress = self.training.progress
        allowed = self.training.config.optimizer.max_skipped_updates
        fault, reason = self._why_skipped(result)
        self.log.say(
            f"update {progress.update} skipped: its gradient {fault} ({reason}, "
            f"{progress.skipped} skipped so far)"
        )
        if progress.skipped_in_a_row >= allowed:
            raise RunError(
                f"{allowed} updates in a row were skipped, because their gradient {fault}. The "
                f"last skipped update is {progress.update} ({reason}). The checkpoints are "
                "untouched. "
                f"Try a lower learning_rate, --mixed_precision no{self.task.non_finite_advice}."
            )

    def _why_skipped(self, result: UpdateResult) -> tuple[str, str]:
        """Return what is wrong with the gradient of a skipped update, and why.

        All ranks call this method.
        """
        norms = {name: value.item() for name, value in result.norms.items()}
        largest = self.training.config.optimizer.skip_grad_norm
        finite = all(gather_objects(all(map(math.isfinite, norms.values()))))
        if largest is None or not finite:
            return "is not finite", describe(result.values, result.keys, self.task)
        shown = ", ".join(f"{name} {norm:.4g}" for name, norm in norms.items())
        return f"is above skip_grad_norm {largest:g}", shown

    def _row(self) -> None:
        config, progress = self.training.config, self.training.progress
        means = self.window.means()
        own = self.task.row(progress.update, means)
        rate = learning_rate(
            progress.update - 1,
            peak=config.optimizer.learning_rate,
            config=config,
            pause=self.task.pause(next(iter(self.task.learners))),
        )
        engine = {"optimizer/learning_rate": rate, "optimizer/skipped": progress.skipped}
        self.log.row(progress.update, {**means, **own, **engine})

    def _validate(self) -> None:
        """Measure the averaged weights and draw samples."""
        training, update = self.training, self.training.progress.update
        picture = sample_path(training.folder, update)
        if self._validation_seconds > SILENT_SECONDS:
            self.log.say(f"validating after update {update:,}")

        start = time.perf_counter()
        with self.log.pause(), training.evaluating():
            values = self.task.validate(update)
            drawn = is_main() and self.task.save_samples(picture)
        self._validation_seconds = time.perf_counter() - start

        if values:
            self.log.write(update, values)
        if drawn:
            self.log.picture(update, picture)
        if values:
            self.log.say(f"update {update:,}: {self.task.validation_line(values)}")
            self._validated(values)

    def _validated(self, values: dict[str, float]) -> None:
        """Pass the results of a validation to the task, but not those of the untrained model."""
        if self.training.progress.update > 0:
            self.task.validated(self.training.progress.update, values)

    def _save(self) -> Path:
        training, update = self.training, self.training.progress.update
        with self.log.pause():
            snapshot = take_snapshot(training, self.window.state())
            if is_main():
                save_checkpoint(
                    training.folder,
                    snapshot,
                    update=update,
                    keep=training.config.run.checkpoints_total_limit,
                )
            barrier()
        return training.folder / f"{PREFIX}{update}"
