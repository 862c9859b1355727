"""Compute the weight of the adversarial loss, which grows along a ramp over updates.

The module also computes the largest value of VQGAN's adaptive weight, a ratio of gradients.
"""

from dataclasses import dataclass

from latentvae.losses.discriminator_config import DiscriminatorConfig


@dataclass(frozen=True, kw_only=True)
class AdversarialWeight:
    """Computes when the discriminator learns, and the weight of the model's adversarial loss.

    Args:
        scale: weight at the end of the ramp. 0 leaves the term out.
        warmup_updates: number of updates after the start in which only the discriminator learns.
        ramp_updates: number of updates after the warm-up in which the weight grows from 0.
        adaptive: multiply the weight by a ratio of gradients, see `adversarial.adaptive_weight`.
        cap: largest ratio of gradients.
        cap_on_sums: whether the cap was chosen for losses that are sums over image elements instead
            of means.
    """

    scale: float = 0.0
    warmup_updates: int = 0
    ramp_updates: int = 0
    adaptive: bool = False
    cap: float = 1.0
    cap_on_sums: bool = False

    def cap_at(self, elements: int) -> float:
        """Return the largest ratio for images with this number of ``elements`` (C x H x W).

        Our pixel loss is a mean over elements. If it were a sum, the ratio would be ``elements``
        times as large.
        """
        return self.cap / elements if self.cap_on_sums else self.cap

    def factor(self, update: int, *, start: int) -> float | None:
        """Return the weight in update ``update`` (from 0), not multiplied by the adaptive weight.

        The weight is None before ``start``, when the discriminator is not used at all. After
        ``start``, the discriminator learns in every update. For `warmup_updates` it learns alone,
        and the weight is 0. Then the weight grows linearly from 0 to `scale`, so that an untrained
        discriminator has little effect on the model.
        """
        if self.scale == 0 or update < start:
            return None
        if self.learns_alone(update, start=start):
            return 0.0
        since = update - start - self.warmup_updates
        ramp = since / self.ramp_updates if self.ramp_updates else 1.0
        return self.scale * min(ramp, 1.0)

    def learns_alone(self, update: int, *, start: int) -> bool:
        """Return whether only the discriminator learns in update ``update`` (from 0)."""
        return self.scale > 0 and start <= update < start + self.warmup_updates


def adversarial_weight(options: DiscriminatorConfig) -> AdversarialWeight:
    """Return the `AdversarialWeight` that the options of the discriminator describe."""
    return AdversarialWeight(
        scale=options.disc_scale,
        warmup_updates=options.disc_warmup_steps,
        ramp_updates=options.disc_ramp_steps,
        adaptive=options.disc_adaptive_weight,
        cap=options.disc_weight_cap,
        cap_on_sums=options.disc_cap_on_sums,
    )
