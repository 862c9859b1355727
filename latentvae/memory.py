"""What the process does with memory that was freed."""

import ctypes
import os
import sys

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory of this process for its next tensors, from now on.

    By default glibc gives every tensor of more than 32 MiB back to the system, and much of the
    rest, and the next one faults its pages in again, 4 KiB at a time: in a virtual machine, that
    is a tenth to a fifth of an update or a decode on the CPU. Kept memory stays with the process,
    up to the most that it needed at once.

    Returns:
        Whether it does. Not with another C library, nor where the environment has settings of its
        own for the allocator (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    configured = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform != "linux" or configured:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
