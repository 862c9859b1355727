"""A clean stop: SIGTERM, SIGINT and SIGUSR1 let the update finish, then the loop saves.

SLURM sends SIGUSR1 before a time limit. A second signal ends the run at once.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows has no SIGUSR1
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_ECHO = 2.0  # seconds in which a launcher may repeat a signal that has reached all processes


class Interrupt:
    """Context manager that notes the first signal and restores the handlers at its end.

    `accelerate launch` does not pass SIGTERM to a single training process. So the loss of that
    launcher counts as SIGTERM too.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread handle signals
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _ECHO:
            sys.exit(128 + number)

    @property
    def requested(self) -> int:
        """The number of the signal that asked to stop, or 0."""
        if self.signal is None and self._launcher is not None and os.getppid() != self._launcher:
            self.signal = signal.SIGTERM
        return self.signal or 0
