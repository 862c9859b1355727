"""The controller of the KL's weight: it moves until a target is held (GECO: Rezende and Viola 2018,
arXiv:1810.00597; ControlVAE: Shao et al. 2020, arXiv:2004.05988).

    e = clip(log(bits / target), -1, 1)       log w += rate * e + damping * (e - last e)
    e = clip(4 * log(target / error), -1, 1)  log w += rate * e

The weight is a factor on `kl_scale`, where it starts. Bits per latent element, or the error of the
reconstruction, are a mean over micro-steps and ranks, in units that depend on neither resolution
nor channels. The error e is relative, so one rate serves all.

Networks answer late, so that the sum alone swings about the target in bits. The second term
(ControlVAE's proportional one, of GECO's logarithm) damps it. A reconstruction error is noisy from
batch to batch and answers the weight little, so it has no such term and a steeper error. It also
stays above its target as long as the network has not learned enough, whatever the weight. The
weight then falls to a tenth of where it started and no further, for it must be found again.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latentvae.losses.objective_config import KL_WEIGHTS, ObjectiveConfig


class KLTarget:
    """Factor on `kl_scale` that moves once per update.

    Args:
        target: what is held, in the unit of the value logged as `target_name`.
        kl_scale: weight at the start.
        rate: what an update adds to the logarithm of the weight while the target is missed by far.

    Attributes:
        target_name: log name of what has the target.
        unit: the target in words, for a format.
        sign: 1 where a larger weight lowers the value, -1 where it raises the value.
        steepness: factor on the logarithm of value over target.
        damping: how much of a change of the error is answered at once.
        lowest: smallest factor, beside the smallest weight of `KL_WEIGHTS`.
        log_factor: logarithm of the factor in this update; 0 at the start.
        error: relative error of the update before; 0 at the start.
    """

    target_name: str
    unit: str
    sign = 1.0
    steepness = 1.0
    damping = 0.0
    lowest = 0.0

    def __init__(self, target: float, *, kl_scale: float, rate: float) -> None:
        self.target = target
        self.rate = rate
        least, most = (weight / kl_scale for weight in KL_WEIGHTS)
        self.bounds = math.log(max(least, self.lowest)), math.log(most)
        self.log_factor = 0.0
        self.error = 0.0

    def __call__(self, update: int) -> float:
        """Factor on the KL's weight in this update."""
        return math.exp(self.log_factor)

    def measured(self, logged: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Mean over micro-steps of what has the target, (1,), from what they logged on this rank;
        (0,) of no micro-step."""
        if not logged:
            return torch.empty(0)
        return torch.stack([values[self.target_name].float() for values in logged]).mean(
            0, keepdim=True
        )

    def follow(self, found: float) -> None:
        """Move the weight.

        Args:
            found: mean over all ranks of `measured`.
        """
        error = self.sign * _clipped_log(found / self.target, times=self.steepness)
        moved = self.rate * error + self.damping * (error - self.error)
        lowest, highest = self.bounds
        self.log_factor = min(max(self.log_factor + moved, lowest), highest)
        self.error = error

    def state_dict(self) -> dict[str, float]:
        return {"log_factor": self.log_factor, "error": self.error}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a `state_dict`.

        Raises:
            ValueError: other names than those of a `state_dict`.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"The state of a KL target has log_factor and error (got {sorted(state)})."
            )
        self.log_factor, self.error = float(state["log_factor"]), float(state["error"])


class BitsTarget(KLTarget):
    """Holds the KL, in bits per latent element."""

    target_name = "latent/kl_bits_per_element"
    unit = "{:g} bits per latent element"
    damping = 2.0  # the weight answers an error of 10% by 20% at once


class ErrorTarget(KLTarget):
    """Holds the pixel loss, of images in [-1, 1]."""

    target_name = "loss/rec"
    unit = "a pixel loss of {:g}"
    sign = -1.0
    steepness = 4.0
    lowest = 0.1


def kl_target(options: ObjectiveConfig) -> KLTarget | None:
    """The controller that the options ask for; None without a target."""
    for kind, target in ((BitsTarget, options.kl_target), (ErrorTarget, options.rec_target)):
        if target:
            return kind(target, kl_scale=options.kl_scale, rate=options.kl_target_rate)
    return None


def _clipped_log(ratio: float, *, times: float) -> float:
    """From -1 to 1; a ratio of 0 and less, which is rounding, counts as -1."""
    return min(max(times * math.log(ratio), -1.0), 1.0) if ratio > 0 else -1.0
