"""Stop a run cleanly at the first signal, and at once at the second.

After the first signal, the run finishes its update and saves a checkpoint. The signals are SIGTERM,
SIGINT (Ctrl-C), SIGHUP (a closed terminal or a lost ssh connection) and SIGUSR1 (sent by SLURM
before a time limit). A process that ignores SIGHUP, as under `nohup`, keeps ignoring it. A signal
within 2 seconds after the first does not count as a second signal, because launchers may repeat a
signal. A later SIGHUP does not count either.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # Windows has only the first two
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_HANGUP = getattr(signal, "SIGHUP", None)
_ECHO = 2.0  # seconds in which a launcher may repeat a signal that has reached all processes


class Interrupt:
    """A context manager that records the first signal, and restores the signal handlers on exit.

    `accelerate launch` does not pass SIGTERM to a single training process. So the end of the
    launcher counts as SIGTERM too.

    Args:
        next_update: returns the number of the update that the run finishes before it saves, for
            the message at a signal. With None, as on ranks other than 0, no message is printed.
    """

    def __init__(self, next_update: Callable[[], int] | None = None) -> None:
        self.signal: int | None = None
        self.next_update = next_update
        self._since = 0.0
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._previous: dict[int, Any] = {}
        self._terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread handle signals
        for number in _SIGNALS:
            if number != _HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == _HANGUP:
            self._leave_terminal()
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            self._acknowledge()
        # If the terminal closes after Ctrl-C, the user still wants the checkpoint.
        elif number != _HANGUP and time.monotonic() - self._since > _ECHO:
            sys.exit(128 + number)

    def _acknowledge(self) -> None:
        """Print at once that the run will stop.

        The method does not call `print`, because the signal may have come during another `print`.
        """
        if self.next_update is None:
            return
        text = f"\nfinishing update {self.next_update():,}, then saving. "
        text += "To stop at once, send the signal again"
        if self._launcher is not None:  # the launcher ends at once on Ctrl-C and frees the terminal
            text += f" (with `kill {os.getpid()}` after the launcher has ended)"
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())

    def _leave_terminal(self) -> None:
        """Discard all later output to the terminal, because writing to a closed one is an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    @property
    def requested(self) -> int:
        """The number of the signal that asked to stop, or 0."""
        if self.signal is None and self._launcher is not None and os.getppid() != self._launcher:
            self.signal = signal.SIGTERM
            self._acknowledge()
        return self.signal or 0


def _is_terminal(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return os.isatty(descriptor)
    return False
