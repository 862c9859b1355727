"""A training whose process 1 goes wrong in its third update; `-m tests.faults.faulty KIND FLAGS`.

Started by test_rank_faults.py.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from latentvae.cli.train import run_training
from latentvae.distributed import rank
from latentvae.engine.updates import Updates


def _raise() -> None:
    raise ZeroDivisionError("a fault of process 1")


FAULTS: dict[str, Callable[[], object]] = {
    "dead": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raising": _raise,
    "exiting": lambda: sys.exit(0),
    "hanging": lambda: time.sleep(3600),
}


def main(kind: str, flags: list[str]) -> None:
    original = Updates.micro_step

    def faulty(self: Updates, *args: Any) -> Any:
        if rank() == 1 and self.progress.update == 2:
            FAULTS[kind]()
        return original(self, *args)

    Updates.micro_step = faulty  # type: ignore[method-assign]
    run_training(flags, description="")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
