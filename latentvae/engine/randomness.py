"""Seed the global random generators at each micro-step from counters, such as step and rank.

The same counters give the same random numbers, so a checkpoint needs no state of a random
generator.
"""

import random
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """The purposes of random numbers. Each purpose has its own random numbers."""

    WEIGHTS = 1
    MICRO_STEP = 2
    EXPORT = 3
    CODEBOOK = 4


def seed_everything(stream: Stream, seed: int, *counters: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a seed and counters such as step and rank."""
    mixed = _mixed(stream, seed, *counters)
    random.seed(int(mixed[0]))
    np.random.seed(int(mixed[0] % 2**32))
    _seed_torch(int(mixed[1] >> np.uint64(1)), in_update=stream == Stream.MICRO_STEP)


def _seed_torch(seed: int, *, in_update: bool) -> None:
    """Seed torch on all devices. In an update, seed only the devices that are in use.

    For each kind of device that is not in use, `torch.manual_seed` records a stack trace. In
    updates of 5 ms, recording the stack traces took about a tenth of the time.
    """
    if not in_update:
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            device.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def generator_for(stream: Stream, seed: int, *counters: int) -> torch.Generator:
    """Return a new CPU generator. The same arguments give the same numbers on every rank."""
    mixed = _mixed(stream, seed, *counters)
    return torch.Generator().manual_seed(int(mixed[1] >> np.uint64(1)))


def _mixed(stream: Stream, *counters: int) -> np.ndarray:
    return np.random.SeedSequence([stream, *counters]).generate_state(2, np.uint64)
