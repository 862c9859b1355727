"""Actions in forks of this process, where every import is done: ranks and killed trainings cost
their work alone, not the seconds of a new Python."""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

# By default, all processes share the lock of tqdm: a fork that is killed while it holds the lock
# would block the others. Classes that inherit from tqdm take its lock, so it is set before theirs.
tqdm.set_lock(threading.RLock())

LIMIT = 120.0  # seconds, after which a fork counts as hung
POLL = 0.002


def forked(action: Callable[[], Any], *, output: Path, kill_after: float | None = None) -> int:
    """Run in a fork and wait; returns its exit code, or -9 after SIGKILL.

    Args:
        output: file that takes all it prints.
        kill_after: seconds after which to kill it.
    """
    output.write_text("")
    pid = start_fork(action, output=output)
    limit = LIMIT if kill_after is None else kill_after
    code = _end_of(pid, deadline=time.monotonic() + limit)
    if code is not None:
        return code
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert kill_after is not None, f"hung: {output.read_text()}"
    return os.waitstatus_to_exitcode(status)


def ranks(action: Callable[[], Any], *, output: Path, processes: int = 2) -> str:
    """Run in as many processes as one, each with the environment that `accelerate launch` gives.

    Args:
        action: all ranks do it; they differ by `latentvae.distributed.rank()`.
        output: file that takes all they print.
        processes: one has no environment of ranks, as without a launcher.

    Returns:
        What they printed, if all of them ended well; an `AssertionError` with it otherwise.
    """
    codes, text = ended_ranks(action, output=output, processes=processes)
    assert codes == [0] * processes, text
    return text


def ended_ranks(
    action: Callable[[], Any], *, output: Path, processes: int = 2
) -> tuple[list[int], str]:
    """As `ranks`, for processes that may fail: their exit codes, and what they printed."""
    return end_of_ranks(start_ranks(action, output=output, processes=processes), output=output)


def start_ranks(action: Callable[[], Any], *, output: Path, processes: int = 2) -> list[int]:
    """As `ranks`, for whoever kills them: the ids of the processes, for `end_of_ranks`."""
    output.write_text("")
    shared = {
        "ACCELERATE_USE_CPU": "true",
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
    }

    def of_rank(rank: int) -> None:
        if processes > 1:
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        AcceleratorState._reset_state(True)  # the parent's may be of one process
        action()

    return [start_fork(lambda rank=rank: of_rank(rank), output=output) for rank in range(processes)]


def end_of_ranks(pids: list[int], *, output: Path) -> tuple[list[int], str]:
    """Wait for all of them: exit codes, -9 after SIGKILL, and what they printed."""
    deadline = time.monotonic() + LIMIT
    codes = [_end_of(pid, deadline=deadline) for pid in pids]
    for pid, code in zip(pids, codes, strict=True):
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert None not in codes, f"hung: {output.read_text()}"
    return [code for code in codes if code is not None], output.read_text()


def start_fork(action: Callable[[], Any], *, output: Path) -> int:
    """Returns the id of the process, for whoever waits for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _in_the_fork(action, output)
    return pid


def _in_the_fork(action: Callable[[], Any], output: Path) -> None:
    """Nothing of the parent's may run in it afterwards."""
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # another thread of the parent may hold the parent's
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print("" if isinstance(end.code, int) else end.code or "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_of(pid: int, *, deadline: float) -> int | None:
    """The exit code; None if the process still runs at the deadline."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL)
    return None


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
