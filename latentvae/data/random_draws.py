"""Counter-based random numbers: a draw depends on what it is for, never on what was drawn before.

So augmentation and order are the same in any worker, on any rank and after a resume, and leave
the global generators alone.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a draw is for; every stream has its own fixed number of counters."""

    ORDER = 1  # (seed, epoch)
    AUGMENT = 2  # (seed, epoch, index)
    REPLACE = 3  # (seed, epoch, index, attempt)


def counter_rng(stream: Stream, *counters: int) -> np.random.Generator:
    """A generator seeded from the stream and its counters (each 0 or above)."""
    return np.random.default_rng([int(stream), *counters])
