"""Keep freed memory in the process, or give it back to the system."""

import ctypes  # noqa: TID251 (calls the C library's allocator)
import os
import sys
from typing import Any

import torch

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # glibc's malloc.h


def keep_freed_memory(device: torch.device) -> bool:
    """Let the C library keep freed memory for the next tensors of this process, from now on.

    By default glibc gives every tensor of more than 32 MiB back to the system, and much of the
    rest. The next tensor then faults its pages in again, 4 KiB at a time. In a virtual machine this
    takes about a tenth of an update or a decode on the CPU.

    The process keeps about its peak memory, and 1.5 times that or more for large images
    (fragmentation). Tensors of more than 64 MiB are kept only in the main thread. After a fork, the
    pages that both processes write are made again. So start workers before the work, or keep them.

    Args:
        device: where the tensors are. Only the CPU has an effect.

    Returns:
        Whether memory is kept. It is not with another C library, or if the environment sets the
        allocator by itself (`MALLOC_...` or `GLIBC_TUNABLES`, which may be empty).
    """
    configured = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device.type != "cpu" or configured:
        return False
    mallopt = _c_function("mallopt")
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Give the memory that the C library keeps back to the system. Needs glibc."""
    if (trim := _c_function("malloc_trim")) is not None:
        trim(0)


def _c_function(name: str) -> Any:
    """Return the process's C function of that name, or None."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
