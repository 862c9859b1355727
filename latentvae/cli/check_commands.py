"""The commands that check a training: `latentvae preflight` and `latentvae verify-resume`."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from latentvae.cli.trainings import training_of
from latentvae.errors import UserError

if TYPE_CHECKING:
    from latentvae.engine.task import Task


@dataclass(frozen=True)
class VerifyResume:
    """Check that a killed run resumes exactly: train a little, kill, resume and compare.

    The command makes a short version of your training twice, with `accelerate launch` and with your
    model, images and precision. The first training is not interrupted. In the second training, all
    processes are killed (SIGKILL) several times, at random moments during updates and saves. After
    each kill, the training is resumed.

    At the end, both trainings must have equal weights, optimizer states, moving averages,
    discriminators, counters, log rows and exported models. On the CPU with at most two processes,
    the two trainings must be equal bit by bit. Otherwise, a difference is allowed if it is similar
    to the difference between two trainings without interruptions.

        latentvae verify-resume kl_f8 --train_data_dir photos --mixed_precision bf16 --processes 8

    The command also takes all flags of training, which `latentvae train --config CONFIG --help`
    lists. The exit code is 0 if all checks pass, 1 if a check failed, and 2 if an argument is
    wrong.
    """

    config: Positional[str]
    """Configuration of the training: the name of a preset, or a YAML file."""

    updates: int = 12
    """Number of updates of each of the two trainings (one without interruptions, one that is killed
    and resumed)."""

    kills: int = 3
    """Number of times that the second training is killed and resumed. The first training is not
    killed. Half of the kills (rounded down) are aimed at moments when a checkpoint is saved."""

    processes: int = 1
    """Number of processes of each training, as in `accelerate launch --num_processes`."""

    kill_seed: int = 0
    """Seed of the random moments at which processes are killed."""

    work_dir: Path | None = None
    """New folder for the files of both trainings. This folder is kept after the command. By
    default, the command uses a temporary folder, and deletes this folder if all checks pass."""

    json: Path | None = None
    """JSON file to write the results of the checks to."""

    launch_timeout: int = 3600
    """Longest time in seconds for one call of `accelerate launch`. After this time, the call counts
    as hung."""

    def run(self, flags: Sequence[str]) -> None:
        """Check the run that the flags of training describe, and exit."""
        from latentvae.proofs.verify_resume import verify_resume

        # Each launched training is in a process session of its own, so SIGTERM to this process does
        # not reach it. sys.exit raises an exception in this process, and `verify_resume` then ends
        # the trainings.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        options = dict(vars(self))
        name = options.pop("config")
        task, config = run_of(name, flags, also=list(options))
        raise SystemExit(verify_resume(task, config, **options))


@dataclass(frozen=True)
class Preflight:
    """Check a run before it starts: train a few updates and print a line per check.

    The command trains with the model, images, precision and number of processes of your run. The
    command checks that

    - the gradient of every loss reaches the weights that this loss should train, and no others,
    - the weights and their moving average change,
    - all processes have the same model, and each process reads different images,
    - a training that resumes from a checkpoint computes exactly the same next update.

    The command also estimates the time, memory and disk space of the complete run. The command
    neither reads nor writes the folder `output_dir` of the run.

        latentvae preflight kl_f8 --train_data_dir photos --output_dir runs/first
        accelerate launch --num_processes 8 -m latentvae.cli preflight kl_f8 --train_data_dir ...

    The command also takes all flags of training, which `latentvae train --config CONFIG --help`
    lists. The exit code is 0 if all checks pass, 1 if a check failed, and 2 if an argument is
    wrong.
    """

    config: Positional[str]
    """Configuration of the training: the name of a preset, or a YAML file."""

    json: Path | None = None
    """JSON file to write the results of the checks to."""

    def run(self, flags: Sequence[str]) -> None:
        """Check the run that the flags of training describe, and exit."""
        _, config = run_of(self.config, flags, also=["json"])
        raise SystemExit(training_of(self.config).preflight(config, json=self.json))


def run_of(config: str, flags: Sequence[str], *, also: Sequence[str]) -> "tuple[type[Task], Any]":
    """Return the task and the options of a run, for a command that takes the flags of training.

    The sections (groups of options) in the config determine the kind of training, such as
    `train-prior`.

    Args:
        config: preset or YAML file.
        flags: flags of training.
        also: names of options that the command has besides the flags of training. The error about
            an unknown flag suggests the most similar name, which can be one of these names.
    """
    from latentvae.cli.train import config_from_arguments

    if any(flag.split("=")[0] == "--config" for flag in flags):
        raise UserError(f"--config is not allowed, because '{config}' is already the config")
    task = training_of(config).task()
    arguments = ["--config", config, *flags]
    schema = task.config_class
    return task, config_from_arguments(arguments, description="", schema=schema, also=also)
