"""Counter-based randomness: each micro-step seeds the global generators anew, so no generator state
is ever saved."""

import random

import numpy as np
import torch


def seed_everything(seed: int, *counters: int) -> None:
    """Seed Python, NumPy and torch (all devices) from ``seed`` and counters such as (micro_step,
    rank)."""
    mixed = np.random.SeedSequence([seed, *counters]).generate_state(2, np.uint64)
    random.seed(int(mixed[0]))
    np.random.seed(int(mixed[0] % 2**32))
    torch.manual_seed(int(mixed[1] >> np.uint64(1)))
