"""Schedules as functions of the update. Nothing here counts steps."""

import math

from latentvae.config.run_config import JobConfig


def learning_rate(update: int, *, peak: float, config: JobConfig) -> float:
    """Return the rate of `update` (from 0): linear warm-up, then constant or a cosine to 0."""
    warmup, total = config.optimizer.lr_warmup_steps, config.run.max_train_steps
    if update < warmup:
        return peak * (update + 1) / warmup
    if config.optimizer.lr_scheduler == "constant":
        return peak
    progress = (update - warmup) / max(total - warmup, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def cosine_decay(update: int, *, start: float, end: float, steps: int) -> float:
    """Return the value of `update` on half a cosine from `start` to `end`.

    It is `start` in update 0 and `end` from update `steps` on. DALL-E's dVAE lowers its temperature
    so (Ramesh et al. 2021, arXiv:2102.12092, appendix A.2).
    """
    progress = min(update / steps, 1.0) if steps else 1.0
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
