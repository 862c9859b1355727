"""Keep freed memory in the process, or give it back to the system."""

import ctypes  # noqa: TID251 (calls the C library's allocator)
import os
import sys
from typing import Any

import torch

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # glibc's malloc.h


def keep_freed_memory(device: torch.device) -> bool:
    """Let the C library keep freed memory for later tensors of this process, from now on.

    By default, when a tensor of more than 32 MiB is freed, the C library glibc gives its memory
    back to the system. glibc often gives back the memory of smaller tensors too. The next tensor
    then causes a page fault for every 4 KiB. In a virtual machine, page faults take about a tenth
    of the time of a training update or a decode on the CPU.

    After this call, the process keeps about its peak memory. For large images, the process keeps
    1.5 times its peak memory or more, because of fragmentation. Memory of tensors above 64 MiB is
    kept only in the main thread. After a fork, the system copies each page that the parent or the
    child process writes. So start worker processes before the computation begins, or keep the
    same worker processes alive.

    Args:
        device: device of the tensors. The function has an effect only for the CPU.

    Returns:
        Whether the process keeps freed memory. The result is False if `device` is not the CPU, if
        the C library is not glibc, or if an environment variable sets the allocator (`MALLOC_...`
        or `GLIBC_TUNABLES`, even if the variable is empty).
    """
    configured = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device.type != "cpu" or configured:
        return False

    mallopt = _c_function("mallopt")
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Give back to the system the freed memory that the C library keeps. Works only with glibc."""
    if (trim := _c_function("malloc_trim")) is not None:
        trim(0)


def _c_function(name: str) -> Any:
    """Return the process's C function with the given name, or None if it is not found."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
