"""Counter-based randomness: each micro-step seeds the global generators anew, so no generator state
is ever saved."""

import random
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What is drawn; streams share no numbers."""

    WEIGHTS = 1
    MICRO_STEP = 2
    EXPORT = 3
    CODEBOOK = 4


def seed_everything(stream: Stream, seed: int, *counters: int) -> None:
    """Seed Python, NumPy and torch (all devices), e.g. from (MICRO_STEP, seed, micro_step,
    rank)."""
    mixed = _mixed(stream, seed, *counters)
    random.seed(int(mixed[0]))
    np.random.seed(int(mixed[0] % 2**32))
    torch.manual_seed(int(mixed[1] >> np.uint64(1)))


def generator_for(stream: Stream, seed: int, *counters: int) -> torch.Generator:
    """A generator of its own, on the CPU: the same on every rank for the same counters."""
    mixed = _mixed(stream, seed, *counters)
    return torch.Generator().manual_seed(int(mixed[1] >> np.uint64(1)))


def _mixed(stream: Stream, *counters: int) -> np.ndarray:
    return np.random.SeedSequence([stream, *counters]).generate_state(2, np.uint64)
