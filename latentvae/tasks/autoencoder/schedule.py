"""Every schedule is a function of the update, evaluated by the loop: nothing counts steps in
secret."""

import math

from latentvae.config.autoencoder import TrainConfig
from latentvae.losses.discriminator_config import CriticConfig


def learning_rate(update: int, *, peak: float, config: TrainConfig) -> float:
    """Learning rate of update ``update`` (from 0): linear warm-up, then constant or a cosine to
    0."""
    warmup, total = config.optimizer.lr_warmup_steps, config.run.max_train_steps
    if update < warmup:
        return peak * (update + 1) / warmup
    if config.optimizer.lr_scheduler == "constant":
        return peak
    progress = (update - warmup) / max(total - warmup, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def adversarial_factor(update: int, *, start: int, critic: CriticConfig) -> float | None:
    """Weight of the adversarial term in update ``update`` (from 0), before the adaptive weight.

    None before ``start``: the critic is not even evaluated. From then on the critic learns in every
    update, at first for `disc_warmup_steps` alone (weight 0), and the weight grows linearly from 0
    to `disc_scale` over `disc_ramp_steps`, so no untrained critic is obeyed.
    """
    if critic.disc_scale == 0 or update < start:
        return None
    if critic_learns_alone(update, start=start, critic=critic):
        return 0.0
    since = update - start - critic.disc_warmup_steps
    ramp = since / critic.disc_ramp_steps if critic.disc_ramp_steps else 1.0
    return critic.disc_scale * min(ramp, 1.0)


def critic_learns_alone(update: int, *, start: int, critic: CriticConfig) -> bool:
    """Whether the model stands still in update ``update`` (from 0)."""
    return critic.disc_scale > 0 and start <= update < start + critic.disc_warmup_steps
