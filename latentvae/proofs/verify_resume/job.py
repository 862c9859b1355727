"""Shorten a user's run, and launch the short run, either uninterrupted or with kills (SIGKILL)."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from latentvae.config.run_config import JobConfig
from latentvae.engine.checkpoint_files import (
    checkpoints,
    half_written,
    load_checkpoint,
    newest_usable,
    update_of,
)
from latentvae.engine.finished_export import is_exported
from latentvae.engine.task import Task
from latentvae.errors import UserError
from latentvae.proofs.checks import Check
from latentvae.proofs.verify_resume.kills import AFTER_LAST, Kill, carry_out
from latentvae.proofs.verify_resume.launch import Hung, Launch, Pace, training_command


def shortened(task: type[Task], config: Any, *, updates: int, processes: int) -> Any:
    """Return the options of a short run with all phases in which a resume could go wrong.

    Gradients accumulate, checkpoints are saved and deleted, and any learning-rate warm-up is short.
    """
    config = config.for_processes(processes)
    early, run = updates // 4, config.run
    sections = {
        "optimizer": {"lr_warmup_steps": min(config.optimizer.lr_warmup_steps, early)},
        "run": {
            "max_train_steps": updates,
            "global_batch_size": None,
            "gradient_accumulation_steps": max(run.gradient_accumulation_steps, 2),
            "checkpointing_steps": early,
            "validation_steps": updates // 2,
            "log_steps": 1,
            "output_dir": "set by each launch",
            "resume_from_checkpoint": "latest",
            "overwrite_output_dir": False,
            "report_to": "none",
            "push_to_hub": False,
        },
    }
    return task.shortened(config.with_changes(sections), updates=updates)


def on_cpu() -> bool:
    """Return whether Accelerate will train on the CPU."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return forced or not torch.accelerator.is_available()


@dataclass(kw_only=True)
class Job:
    """Launches a short run, uninterrupted or with kills (SIGKILL), and records what happened.

    Attributes:
        task: the task of the short run, whose method `open` has been called.
        work: folder that holds the runs, their printed output and their `config.yaml`.
        processes: number of processes of each launch.
        seconds: time limit of a launch. A launch that takes longer is killed and counts as hung.
        starts: for each launch of the killed run, the number of updates done at its start.
        hits: for each kill, text that says what the kill interrupted.
    """

    task: Task
    work: Path
    processes: int
    seconds: float
    starts: list[int] = field(default_factory=list)
    hits: list[str] = field(default_factory=list)

    @property
    def config(self) -> JobConfig:
        return self.task.config

    def straight(self, name: str, *, title: str) -> Pace:
        """Make an uninterrupted run, and return the measured seconds of its phases.

        Raises:
            UserError: the run does not finish.
        """
        with self._launch(name, output=name) as launch:
            try:
                code, pace = launch.watch(total=self.config.run.max_train_steps, title=title)
            except Hung:
                raise UserError(
                    f"a run that was not killed did not end within {self.seconds:g} s. The run's "
                    f"output is in {launch.output}. Raise launch_timeout if the run needs longer."
                ) from None
        if code:
            raise UserError(
                f"a run that was not killed ended with code {code}, so there is nothing to "
                f"compare: {launch.last_words()} (its whole output: {launch.output})"
            )
        return pace

    def killed(self, kills: list[Kill], pace: Pace) -> list[Check]:
        """Make a run that is killed and started again until it is done, and return its checks."""
        ended, total = "", self.config.run.max_train_steps

        # launches
        try:
            for kill in kills:
                ended = self._once(kill, pace)
                if ended or is_exported(self.task, self.work / "killed", update=total):
                    break  # the run has ended, so no further kill is possible
            ended = ended or self._once(None, pace)
        except Hung:
            ended = f"launch {len(self.starts)} did not end within {self.seconds:g} s"

        # checks
        done, room = ended == "done", len(self.hits) == len(kills)
        over = self.hits[-1:] == [AFTER_LAST]
        starts = ", ".join(map(str, self.starts))
        return [
            Check(
                name="kills",
                passed=room or over,
                value=f"{len(self.hits)}, in {', '.join(self.hits) or 'nothing'}",
                expected=f"{len(kills)} kills, or a kill after the last update",
                advice=f"Give more --updates than {total}.",
            ),
            Check(
                name="resumes",
                passed=done,
                value=f"launches began after {starts} updates" if done else ended,
                expected="each launch resumes from the newest complete checkpoint, and the last "
                "launch finishes the run",
                advice=f"The output of the launches is in {self.work}.",
            ),
            self._leftovers(),
        ]

    def _once(self, kill: Kill | None, pace: Pace) -> str:
        """Launch the killed run once, and kill it at the moment `kill` (if not None).

        Returns:
            "" if the launch was killed, "done" if it finished, or a text that says how it failed.
        """
        folder, number = self.work / "killed", len(self.starts) + 1
        checkpoint, _ = newest_usable(folder)
        self.starts.append(update_of(checkpoint) if checkpoint else 0)
        total = self.config.run.max_train_steps

        # launch
        with self._launch("killed", output=f"killed-{number}") as launch:
            if kill is None:
                launch.watch(total=total, title=f"launch {number}")
            else:
                hit = carry_out(kill, launch, resumed_at=self.starts[-1], updates=total, pace=pace)
                if hit:
                    self.hits.append(hit)
                    print(f"kill {len(self.hits)}: {hit}", flush=True)
                    return ""

        # how it ended
        code = launch.process.returncode
        if code:
            return f"launch {number} ended with code {code}: {launch.last_words()}"
        return "done"

    def _leftovers(self) -> Check:
        folder = self.work / "killed"
        found = [path.name for path in half_written(folder)]
        for path in checkpoints(folder):
            try:
                load_checkpoint(path)
            except UserError:
                found.append(path.name)
        return Check(
            name="half-written folders",
            passed=not found,
            value=", ".join(found) or "none",
            expected="none after the last launch",
            advice="Delete these folders. No launch reads such folders, but they take disk space.",
        )

    def _launch(self, name: str, *, output: str) -> Launch:
        precision = self.config.run.mixed_precision
        command = training_command(
            self.task.launch,
            self.work / "config.yaml",
            self.work / name,
            processes=self.processes,
            precision="no" if precision in (None, "auto") else precision,
        )
        return Launch(
            command,
            folder=self.work / name,
            output=self.work / f"{output}.txt",
            on_cpu=on_cpu(),
            seconds=self.seconds,
        )
