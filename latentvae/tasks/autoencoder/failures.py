"""What can end a run that was started rightly: each becomes one sentence with advice."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from latentvae.config.autoencoder import TrainConfig
from latentvae.errors import RunError, UserError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of safetensors ("I/O error: No space left on device (os error 28)") and the like.
_OS_ERROR = re.compile(r"os error (\d+)")
_CPU_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
SHOWN = 200  # characters of what another library says
_PEERS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out",
)


@contextlib.contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Turn what the machine did to a run into a `RunError`; errors of another kind pass."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        sentence = explanation(error, config)
        if sentence is None:
            raise
        raise RunError(sentence) from error


def explanation(error: Exception, config: TrainConfig) -> str | None:
    """The sentence for an error; None where none is known."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _CPU_MEMORY)
    ):
        return _out_of_memory(config)
    if found := _WORKER.search(text):
        return _worker_died(found[1].strip(), text)
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _PEERS)
    ):
        return (
            "another process of this run has ended, or has hung for longer than ddp_timeout "
            f"{config.run.ddp_timeout} s ({_first_line(text)}); what it said is above. "
            "The same command goes on from the newest checkpoint"
        )
    return _disk(error, text, config)


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")[:SHOWN]


def _disk(error: Exception, text: str, config: TrainConfig) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(text)):
        number = int(found[1])
    if number not in _DISK:
        return None
    folder = Path(config.run.output_dir or ".")
    name = getattr(error, "filename", None) or folder
    if number not in _FULL:
        return (
            f"'{name}' cannot be read or written any more ({errno.errorcode[number]}); what is "
            f"complete in '{folder}' stays, and the same command goes on from there"
        )
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return (
        f"'{name}' cannot be written: the disk is full ({free / 2**20:,.0f} MiB free); the older "
        "checkpoints are whole. Make room, or keep fewer with --checkpoints_total_limit 1, and the "
        "same command goes on"
    )


def _worker_died(pids: str, text: str) -> str:
    small = " or shared memory (/dev/shm) is too small" if "bus error" in text.lower() else ""
    return (
        f"a process that reads images (pid {pids}) was killed, most often because memory ran out"
        f"{small}; try fewer --dataloader_num_workers. The same command goes on from the newest "
        "checkpoint"
    )


def _out_of_memory(config: TrainConfig) -> str:
    run, (height, width) = config.run, config.data.size
    advice = []
    if run.train_batch_size > 1:
        half = (run.train_batch_size + 1) // 2
        advice.append(
            f"--train_batch_size {half} --gradient_accumulation_steps "
            f"{run.gradient_accumulation_steps * 2} (as many images per update)"
        )
    if not run.gradient_checkpointing and config.model.architecture != "dc":
        advice.append("--gradient_checkpointing")
    if run.mixed_precision != "bf16":
        advice.append("--mixed_precision bf16")
    multiple = config.model.f
    smaller = [max(side // 2 // multiple * multiple, multiple) for side in (height, width)]
    advice.append(f"--resolution {' '.join(map(str, dict.fromkeys(smaller)))}")
    return (
        f"out of memory with train_batch_size {run.train_batch_size} at {height} x {width} px, "
        f"mixed_precision {run.mixed_precision or 'as launched'}{_memory()}; the checkpoints are "
        f"untouched. Try, in this order: {'; '.join(advice)}"
    )


def _memory() -> str:
    if not torch.cuda.is_available():
        return ""
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    return f" ({peak / 2**30:.1f} GiB were in use of {total / 2**30:.1f})"
