"""What stands in the loss for the KL, and the weight that moves until a target is held (GECO:
Rezende and Viola 2018, arXiv:1810.00597; ControlVAE: Shao et al. 2020, arXiv:2004.05988).

    e = clip(log(bits / target), -1, 1)               log w += rate * e + DAMPING * (e - last e)
    e = clip(STEEPNESS * log(target / error), -1, 1)  log w += rate * e

The weight is a factor on `kl_scale`, where it starts. Bits per latent element, or the error of the
reconstruction, are a mean over micro-steps and ranks, in units that depend on neither resolution
nor channels, and e is relative: one rate serves all. Networks answer late, so that the sum alone
swings about the target in bits; the second term (ControlVAE's proportional one, of GECO's
logarithm) damps it. A reconstruction error is noisy from batch to batch and answers the weight
little, so it is without that term and steeper. It also is above its target as long as the network
has not learned enough, whatever the weight: the weight then falls to a tenth of where it started
and no further, for it must be found again.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latentvae.losses.objective_config import KL_WEIGHTS, ObjectiveConfig
from latentvae.losses.posterior import capacity, capacity_kl, free_bits_kl, kl_warmup
from latentvae.outputs import AutoencoderOutput

DAMPING = 2.0  # the weight answers an error of 10% by 20% at once
STEEPNESS = 4.0


def kl_in_loss(
    out: AutoencoderOutput, options: ObjectiveConfig, *, update: int, log_factor: float = 0.0
) -> Tensor | None:
    """What takes the place of the mean KL in the loss, nats per image; None: the KL itself.

    Args:
        out: with its graph.
        update: from 0.
        log_factor: of the held weight over `kl_scale`, see `next_log_factor`.
    """
    if out.kl is None:
        return None
    if is_held(options):
        return math.exp(log_factor) * out.kl.mean()
    if not (options.kl_warmup_steps or options.free_bits or options.kl_capacity):
        return None
    factor = kl_warmup(update, options.kl_warmup_steps)
    if options.free_bits:
        kl = torch.stack(
            [
                free_bits_kl(
                    latent.kl_per_channel, bits=options.free_bits, positions=latent.positions
                )
                for latent in out.latents
                if latent.kl_per_channel is not None
            ]
        ).sum()
    elif options.kl_capacity:
        bits = capacity(
            update, target=options.kl_capacity, growth_updates=options.kl_capacity_steps
        )
        kl = capacity_kl(out.kl, bits=bits, elements=out.kl_elements)
    else:
        kl = out.kl.mean()
    return factor * kl


def is_held(options: ObjectiveConfig) -> bool:
    """Whether the weight moves by a target."""
    return bool(options.kl_target or options.rec_target)


def held(values: Sequence[Mapping[str, Tensor]], options: ObjectiveConfig) -> Tensor:
    """What has a target, (1,), by what the micro-steps of this rank logged; (0,) without either."""
    if not (values and is_held(options)):
        return torch.empty(0)
    name = "latent/kl_bits_per_element" if options.kl_target else "loss/rec"
    return torch.stack([logged[name].float() for logged in values]).mean(0, keepdim=True)


def next_log_factor(
    log_factor: float, options: ObjectiveConfig, *, found: float, last_error: float = 0.0
) -> tuple[float, float]:
    """The logarithm of the weight over `kl_scale` in the next update, the weight within
    `KL_WEIGHTS`; and the error now.

    Args:
        log_factor: in this update.
        found: `held`, the mean over all ranks.
        last_error: what this returned in the update before; 0 in the first.
    """
    lowest, highest = (math.log(weight / options.kl_scale) for weight in KL_WEIGHTS)
    if options.kl_target:
        error = _clipped_log(found / options.kl_target)
        moved = options.kl_target_rate * error + DAMPING * (error - last_error)
    else:
        error = -_clipped_log(found / options.rec_target, times=STEEPNESS)
        moved = options.kl_target_rate * error
        lowest = max(lowest, math.log(0.1))
    return min(max(log_factor + moved, lowest), highest), error


def _clipped_log(ratio: float, *, times: float = 1.0) -> float:
    """Of 0 and less, which is rounding, -1."""
    return min(max(times * math.log(ratio), -1.0), 1.0) if ratio > 0 else -1.0
