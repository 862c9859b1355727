"""The weight of the adversarial term: a ramp over updates, and VQGAN's balance by gradients
(arXiv:2012.09841, eq. 7)."""

from dataclasses import dataclass

from latentvae.losses.discriminator_config import DiscriminatorConfig


@dataclass(frozen=True, kw_only=True)
class AdversarialWeight:
    """When the discriminator learns, and how much the model heeds it.

    Args:
        scale: weight at the end of the ramp; 0 leaves the term out.
        warmup_updates: updates after the start in which the discriminator learns alone.
        ramp_updates: updates over which the weight then grows from 0.
        adaptive: multiply the weight by a balance of gradients, see `adversarial.adaptive_weight`.
        cap: largest such balance.
    """

    scale: float = 0.0
    warmup_updates: int = 0
    ramp_updates: int = 0
    adaptive: bool = False
    cap: float = 1.0

    def factor(self, update: int, *, start: int) -> float | None:
        """Weight in update ``update`` (from 0), before the balance.

        None before ``start``: the discriminator is not even evaluated. From then on it learns in
        every update, at first for `warmup_updates` alone (weight 0). The weight then grows linearly
        from 0 to `scale`, so that no untrained discriminator is heeded.
        """
        if self.scale == 0 or update < start:
            return None
        if self.learns_alone(update, start=start):
            return 0.0
        since = update - start - self.warmup_updates
        ramp = since / self.ramp_updates if self.ramp_updates else 1.0
        return self.scale * min(ramp, 1.0)

    def learns_alone(self, update: int, *, start: int) -> bool:
        """Whether the model stands still in update ``update`` (from 0)."""
        return self.scale > 0 and start <= update < start + self.warmup_updates


def adversarial_weight(options: DiscriminatorConfig) -> AdversarialWeight:
    """The weight that the options ask for."""
    return AdversarialWeight(
        scale=options.disc_scale,
        warmup_updates=options.disc_warmup_steps,
        ramp_updates=options.disc_ramp_steps,
        adaptive=options.disc_adaptive_weight,
        cap=options.disc_weight_cap,
    )
