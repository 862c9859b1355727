"""Explain the faults of the machine that can end a correctly started run."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from latentvae.engine.task import Task
from latentvae.errors import RunError, UserError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Matches messages such as safetensors' "I/O error: No space left on device (os error 28)".
_OS_ERROR = re.compile(r"os error (\d+)")
_CPU_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
SHOWN = 200  # number of characters shown of another library's message
_PEERS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out",
)


@contextlib.contextmanager
def explained(task: Task) -> Iterator[None]:
    """Inside this context, turn an error from a fault of the machine into a `RunError`.

    Other errors are raised unchanged.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        sentence = explanation(error, task)
        if sentence is None:
            raise
        raise RunError(sentence) from error


def explanation(error: Exception, task: Task) -> str | None:
    """Return a message that explains an error, or None for an error of an unknown kind."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _CPU_MEMORY)
    ):
        return _out_of_memory(task)
    if found := _WORKER.search(text):
        return _worker_died(found[1].strip(), text)
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _PEERS)
    ):
        return (
            "another process of this run has ended, or has hung for longer than ddp_timeout "
            f"{task.config.run.ddp_timeout} s ({_first_line(text)}). The message of that process "
            "is above. The same command resumes from the newest checkpoint."
        )
    return _disk(error, text, task)


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")[:SHOWN]


def _disk(error: Exception, text: str, task: Task) -> str | None:
    # Is this an error of the disk?
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(text)):
        number = int(found[1])
    if number not in _DISK:
        return None

    folder = Path(task.config.run.output_dir or ".")
    name = getattr(error, "filename", None) or folder
    if number not in _FULL:
        return (
            f"'{name}' cannot be read or written any more ({errno.errorcode[number]}). Complete "
            f"files in '{folder}' are kept. The same command resumes from the newest checkpoint."
        )

    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return (
        f"'{name}' cannot be written: the disk is full ({free / 2**20:,.0f} MiB free). The older "
        "checkpoints are complete. Free some space, or keep fewer checkpoints with "
        "--checkpoints_total_limit 1. Then the same command resumes the run."
    )


def _worker_died(pids: str, text: str) -> str:
    small = " or shared memory (/dev/shm) is too small" if "bus error" in text.lower() else ""
    return (
        f"a process that reads images (pid {pids}) was killed, most often because memory ran out"
        f"{small}. Try fewer --dataloader_num_workers. The same command resumes from the newest "
        "checkpoint."
    )


def _out_of_memory(task: Task) -> str:
    precision = task.config.run.mixed_precision or "as launched"
    return (
        f"out of memory with {task.step_size()}, mixed_precision {precision}{_memory()}. The "
        f"checkpoints are untouched. Try, in this order: {', then '.join(task.memory_advice())}."
    )


def _memory() -> str:
    if not torch.cuda.is_available():
        return ""
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    return f" (at most {peak / 2**30:.1f} of {total / 2**30:.1f} GiB were in use)"
