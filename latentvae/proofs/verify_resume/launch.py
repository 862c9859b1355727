"""Launch a training as users do, watch its files, and kill it by SIGKILL.

The training is started by `accelerate launch` with all its processes.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
from tqdm.auto import tqdm

from latentvae.engine.checkpoint_files import PREFIX
from latentvae.engine.log import read_rows

POLL_SECONDS = 0.002  # a save of a small network takes about ten times as long


class Hung(Exception):
    """Raised if a launched training did not end within the time limit and was killed."""


def training_command(
    script: Sequence[str], config: Path, folder: Path, *, processes: int, precision: str
) -> list[str]:
    """Return the command that starts a training from a YAML file, as in docs/launching.md.

    Args:
        script: script or module that the launcher starts, such as `-m latentvae.cli.train`.
        config: the YAML file.
        folder: the folder of the run.
        processes: number of processes.
        precision: value of the launcher's option `--mixed_precision`.
    """
    many = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *many]
    launcher += ["--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", precision, "--dynamo_backend", "no"]
    return [*launcher, *script, "--config", str(config), "--output_dir", str(folder)]


@dataclass
class Pace:
    """Durations of the phases of a run in seconds, measured on an uninterrupted run."""

    updates: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    tail: float = 0.0  # seconds from the last row of the log to the end of the run

    @property
    def update(self) -> float:
        return statistics.median(self.updates or [0.1])

    @property
    def save(self) -> float:
        return statistics.median(self.saves or [0.02])


class Launch:
    """Starts a training in processes of its own, and can watch and kill them.

    Args:
        command: command that starts the training.
        folder: the run's folder. The methods `updates` and `saving` ignore files that an earlier
            launch has left in this folder.
        output: file to which all output of the training is written.
        on_cpu: train on the CPU even if there is a GPU.
        seconds: time limit of the launch. A launch that takes longer is killed.
    """

    def __init__(
        self, command: list[str], *, folder: Path, output: Path, on_cpu: bool, seconds: float
    ) -> None:
        self.folder = folder
        self.output = output
        self._log = folder / "log.jsonl"
        self._old_log = _inode(self._log)
        self._old_saves = self._temporary()
        cpu = {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
        with output.open("w") as file:
            self.process = subprocess.Popen(  # noqa: S603 (a list, not a shell command)
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | cpu,
                start_new_session=True,  # Ctrl-C reaches only this command, which kills the launch
            )
        self._deadline = time.monotonic() + seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill all processes if the training is still running, also after an exception."""
        if self.running:
            self.kill()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def updates(self) -> int | None:
        """Return the number of updates in the log, or None if this launch has no log file yet."""
        if _inode(self._log) in (None, self._old_log):
            return None
        return max((row["update"] for row in read_rows(self._log)), default=0)

    def saving(self) -> bool:
        """Return whether the training is writing a checkpoint."""
        return bool(self._temporary() - self._old_saves)

    def wait_for(self, event: Callable[[], bool]) -> bool:
        """Wait for an event. Return False if the training ends before the event.

        Raises:
            Hung: neither the event nor the end of the training came within the time limit. The
                training was killed.
        """
        while self.running:
            if event():
                return True
            if time.monotonic() > self._deadline:
                self.kill()
                raise Hung
            time.sleep(POLL_SECONDS)
        return False

    def family(self) -> list[psutil.Process]:
        """Return the launcher and all processes that it started, also indirectly."""
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        return []

    def kill(self, known: list[psutil.Process] | None = None) -> None:
        """Send SIGKILL to all processes at once.

        Args:
            known: processes to stop first, before the search for other processes.
        """
        _send(known or [], signal.SIGSTOP)
        family = self.family()
        _send(family, signal.SIGSTOP)
        family += [process for process in known or [] if process not in family]
        _send([*family, *self.family()], signal.SIGKILL)
        self.process.wait()
        while any(_alive(process) for process in family):
            time.sleep(POLL_SECONDS)

    def watch(self, *, total: int, title: str) -> tuple[int, Pace]:
        """Watch the training to its end with a progress bar.

        Return the exit code, and the measured durations of updates, of saves, and of the time after
        the last update.
        """
        pace, mark, before, began = Pace(), time.monotonic(), None, None
        with tqdm(total=total, desc=title, unit="update", disable=None, leave=False) as bar:
            # read the training's files once
            def look() -> bool:
                nonlocal mark, before, began
                now, done = time.monotonic(), self.updates()
                if done != before:
                    if before is not None and done is not None:
                        pace.updates.append((now - mark) / max(done - before, 1))
                    bar.update((done or 0) - (before or 0))
                    mark, before = now, done
                if self.saving():
                    began = began or now
                elif began is not None:
                    pace.saves.append(now - began)
                    began = None
                return False

            # read them until the training ends
            self.wait_for(look)
        pace.tail = time.monotonic() - mark
        return self.process.wait(), pace

    def last_words(self) -> str:
        """Return the printed line that says how the training ended: an error, or the last line."""
        lines = [line.strip() for line in self.output.read_text(errors="replace").splitlines()]
        errors = [line for line in lines if line.startswith("error:")]
        raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
        return next(iter([*errors, *raised[:1], *reversed(lines), "nothing"]))

    def _temporary(self) -> set[str]:
        return {path.name for path in self.folder.glob(f"{PREFIX}*.tmp-*")}


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _alive(process: psutil.Process) -> bool:
    """Return whether a process can still write files. A zombie process cannot."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
