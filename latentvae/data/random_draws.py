"""Counter-based random numbers: a draw depends on its purpose and counters, not on earlier draws.

The counters are numbers such as the seed, the epoch and the number of an image. So augmentation and
the order of the images are the same in any worker, on any rank and after a resume. The global
random generators are not used.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The purpose of a draw. All draws of one purpose use the same number of counters."""

    ORDER = 1  # (seed, epoch)
    AUGMENT = 2  # (seed, epoch, index)
    REPLACE = 3  # (seed, epoch, index, attempt)


def counter_rng(stream: Stream, *counters: int) -> np.random.Generator:
    """Return a generator seeded from the stream and its counters (each 0 or above)."""
    return np.random.default_rng([int(stream), *counters])
