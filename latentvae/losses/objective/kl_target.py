"""Control the KL's weight so that the KL or the pixel loss reaches a target.

Sources: GECO (Rezende and Viola 2018, arXiv:1810.00597) and ControlVAE (Shao et al. 2020,
arXiv:2004.05988).

    bits:   e = clip(log(bits / target), -1, 1)       log w += rate * e + damping * (e - last e)
    error:  e = clip(4 * log(target / error), -1, 1)  log w += rate * e

The weight of the KL is `kl_scale` times a factor w, which starts at 1. After each update, the
formula `bits` changes w if the target is a KL, and the formula `error` changes w if the target is a
pixel loss. In these formulas, `bits` is the KL in bits per latent element, and `error` is the pixel
loss. The values `bits` and `error` are means over micro-steps (the forward and backward passes of
one update) and ranks. The units of `bits` and `error` depend neither on the resolution nor on the
number of channels. The deviation e from the target is relative, so the same `rate` fits all
targets.

A network reacts late to the KL's weight, so the term `rate * e` alone would make the KL oscillate
around its target. The term with `damping` reduces the oscillations of the KL. This damping term is
ControlVAE's proportional term, applied to the logarithm of the weight as in GECO. A pixel loss is
noisy from batch to batch and reacts little to the KL's weight. So the formula `error` has the
factor 4 and no damping.

At the start of training, the pixel loss stays above its target with any weight of the KL, because
the network has not learned enough. During this time, the formula `error` lowers the KL's weight,
but only to a tenth of its initial value, because a smaller weight would need many updates to grow
back.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latentvae.losses.objective_config import KL_WEIGHTS, ObjectiveConfig


class KLTarget:
    """A controller of the KL's weight, which changes a factor on `kl_scale` once per update.

    Args:
        target: the value to reach, in the unit of the value that is logged as `target_name`.
        kl_scale: weight of the KL at the start.
        rate: how much one update changes the logarithm of the weight when the logged value is far
            from the target.

    Attributes:
        target_name: name, in the log, of the value that must reach the target.
        unit: a format string that prints the target with its unit.
        sign: 1 if a larger KL weight lowers the logged value, -1 if a larger weight raises it.
        steepness: factor on the logarithm of (logged value / target).
        damping: factor on the change of the error since the last update.
        lowest: smallest factor on `kl_scale`. The KL's weight also never falls below the lower
            limit in `KL_WEIGHTS`.
        log_factor: logarithm of the factor on `kl_scale` in this update, 0 at the start.
        error: relative deviation from the target in the last update, 0 at the start.
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
        """Return the factor on the KL's weight in this update."""
        return math.exp(self.log_factor)

    def measured(self, logged: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the value that must reach the target, averaged over micro-steps, (1,).

        Args:
            logged: values that each micro-step (forward and backward pass) logged on this rank. If
                the rank had no micro-steps, the result is empty, (0,).
        """
        if not logged:
            return torch.empty(0)
        return torch.stack([values[self.target_name].float() for values in logged]).mean(
            0, keepdim=True
        )

    def follow(self, found: float) -> None:
        """Change the KL's weight so that the measured value moves towards the target.

        Args:
            found: the mean of the results of `measured` over all ranks.
        """
        error = self.sign * _clipped_log(found / self.target, times=self.steepness)
        moved = self.rate * error + self.damping * (error - self.error)
        lowest, highest = self.bounds
        self.log_factor = min(max(self.log_factor + moved, lowest), highest)
        self.error = error

    def state_dict(self) -> dict[str, float]:
        """Return `log_factor` and `error` by name."""
        return {"log_factor": self.log_factor, "error": self.error}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set `log_factor` and `error` to the values of a `state_dict`.

        Raises:
            ValueError: the names are not those of a `state_dict`.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"The state of a KL target must have log_factor and error (got {sorted(state)})."
            )
        self.log_factor, self.error = float(state["log_factor"]), float(state["error"])


class BitsTarget(KLTarget):
    """A controller that brings the KL to a target in bits per latent element."""

    target_name = "latent/kl_bits_per_element"
    unit = "{:g} bits per latent element"
    damping = 2.0  # if the error rises by 10%, the weight changes by about 20% at once


class ErrorTarget(KLTarget):
    """A controller that brings the pixel loss of images in [-1, 1] to a target."""

    target_name = "loss/rec"
    unit = "a pixel loss of {:g}"
    sign = -1.0
    steepness = 4.0
    lowest = 0.1


def kl_target(options: ObjectiveConfig) -> KLTarget | None:
    """Return the controller for the target in the options, or None if no target is set."""
    for kind, target in ((BitsTarget, options.kl_target), (ErrorTarget, options.rec_target)):
        if target:
            return kind(target, kl_scale=options.kl_scale, rate=options.kl_target_rate)
    return None


def _clipped_log(ratio: float, *, times: float) -> float:
    """Return times * log(ratio), clipped to [-1, 1].

    If rounding has made the ratio 0 or negative, the result is -1.
    """
    return min(max(times * math.log(ratio), -1.0), 1.0) if ratio > 0 else -1.0
