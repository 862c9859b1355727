"""What the process does with memory that was freed."""

import ctypes  # noqa: TID251 (asks the C library to keep memory or give it back)
import os
import sys
from typing import Any

import torch

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # glibc's malloc.h


def keep_freed_memory(device: torch.device) -> bool:
    """Let the C library keep freed memory of this process for its next tensors, from now on.

    By default glibc gives every tensor of more than 32 MiB back to the system, and much of the
    rest, and the next one faults its pages in again, 4 KiB at a time: in a virtual machine, that
    is about a tenth of an update or a decode on the CPU. Kept memory stays with the process, about
    as much as it needed at once; of large images half more and above, for holes that do not fit.
    Tensors of more than 64 MiB are kept in the main thread alone, and a process that is forked
    makes the pages that both write new once more: start workers before the work, or keep them.

    Args:
        device: where the tensors are; but for the CPU there is nothing to do.

    Returns:
        Whether it does. Not with another C library, nor where the environment has a name of the
        allocator's settings (`MALLOC_...`, `GLIBC_TUNABLES`; of the second an empty value will do).
    """
    configured = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device.type != "cpu" or configured:
        return False
    mallopt = _c_function("mallopt")
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Give what the C library keeps back to the system, where it is glibc."""
    if (trim := _c_function("malloc_trim")) is not None:
        trim(0)


def _c_function(name: str) -> Any:
    """Of the process; None where there is none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
