"""Compute learning rates and other scheduled values from the number of the update alone."""

import math

from latentvae.config.run_config import JobConfig


def learning_rate(update: int, *, peak: float, config: JobConfig, pause: range = range(0)) -> float:
    """Return the learning rate of an update: linear warm-up, then constant or a cosine down to 0.

    Args:
        update: number of the update, from 0.
        peak: the learning rate after the warm-up.
        config: the options, which set the warm-up, the scheduler and the length of the run.
        pause: updates in which the module with this learning rate does not learn. The warm-up does
            not count these updates.
    """
    warmup, total = config.optimizer.lr_warmup_steps, config.run.max_train_steps
    end = warmup + (len(pause) if pause.start < warmup else 0)
    if update < end:
        paused = len(range(pause.start, min(update, pause.stop)))
        return peak * (update - paused + 1) / warmup

    if config.optimizer.lr_scheduler == "constant":
        return peak
    progress = (update - end) / max(total - end, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def cosine_decay(update: int, *, start: float, end: float, steps: int) -> float:
    """Return the value at `update` of a half cosine from `start` to `end`.

    The value is `start` in update 0 and `end` from update `steps` on. If `steps` is 0, the value is
    always `end`. DALL-E's dVAE lowers its temperature in this way (Ramesh et al. 2021,
    arXiv:2102.12092, appendix A.2).
    """
    progress = min(update / steps, 1.0) if steps else 1.0
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
