"""Compute the weight of the adversarial loss, which grows linearly over some updates.

The module also computes the upper limit of VQGAN's adaptive weight, which is a ratio of gradients.
"""

from dataclasses import dataclass

from latentvae.losses.discriminator_config import DiscriminatorConfig


@dataclass(frozen=True, kw_only=True)
class AdversarialWeight:
    """Decides when the discriminator learns, and what weight the model's adversarial loss has.

    Args:
        scale: final weight. 0 leaves the adversarial loss out.
        warmup_updates: number of updates in which only the discriminator learns, counted from the
            first update that uses the discriminator.
        ramp_updates: number of updates after `warmup_updates` in which the weight grows from 0.
        adaptive: multiply the weight by a ratio of gradients, see `adversarial.adaptive_weight`.
        cap: upper limit of the ratio of gradients.
        cap_on_sums: whether `cap` is meant for a pixel loss that is a sum over image elements
            instead of a mean.
    """

    scale: float = 0.0
    warmup_updates: int = 0
    ramp_updates: int = 0
    adaptive: bool = False
    cap: float = 1.0
    cap_on_sums: bool = False

    def cap_at(self, elements: int) -> float:
        """Return the upper limit of the ratio of gradients, for this training's pixel loss.

        The pixel loss is a mean over image elements. If the pixel loss were a sum, the ratio of
        gradients would be ``elements`` times as large. So a `cap` that is meant for sums is divided
        by ``elements``.

        Args:
            elements: number of elements of an image (C x H x W).
        """
        return self.cap / elements if self.cap_on_sums else self.cap

    def factor(self, update: int, *, start: int) -> float | None:
        """Return the weight of the adversarial loss in update ``update``, counted from 0.

        The returned weight is not yet multiplied by the adaptive weight. The weight is None while
        the discriminator is not used at all: before update ``start``, or if `scale` is 0. From
        ``start`` on, the discriminator learns in every update. For the first `warmup_updates`
        updates from ``start`` on, the weight is 0. The weight then grows linearly from 0 to
        `scale`, so that an untrained discriminator has little effect on the model.
        """
        if self.scale == 0 or update < start:
            return None
        if self.learns_alone(update, start=start):
            return 0.0
        since = update - start - self.warmup_updates
        ramp = since / self.ramp_updates if self.ramp_updates else 1.0
        return self.scale * min(ramp, 1.0)

    def learns_alone(self, update: int, *, start: int) -> bool:
        """Return whether the update is one of those in which only the discriminator learns.

        Args:
            update: number of the update, from 0.
            start: first update that uses the discriminator.
        """
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
