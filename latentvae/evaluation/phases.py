"""Print which phase of an evaluation begins, and about how long it takes."""

import time

from rich.console import Console


class Phases:
    """Numbers the phases of an evaluation and prints a line when one begins.

    Args:
        total: number of phases.
    """

    def __init__(self, total: int) -> None:
        self.total, self.number = total, 0
        self._console, self._start = Console(stderr=True), time.monotonic()

    def begin(self, text: str, *, seconds: float | None = None) -> None:
        """Print a phase's number and name, the time so far, and the estimated `seconds`."""
        self.number += 1
        times = f"{clock(time.monotonic() - self._start)} elapsed"
        if seconds is not None:
            times += f", takes about {clock(seconds)}"
        self.say(f"[{self.number}/{self.total}] {text} ({times})")

    def skip(self, count: int = 1) -> None:
        """Skip the numbers of phases that are not needed or were completed before a restart."""
        self.number += count

    def say(self, text: str) -> None:
        """Print a line that does not begin a phase."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Return a time in seconds as text in minutes and seconds, such as `2:05`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
