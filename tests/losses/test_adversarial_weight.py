"""The weight of the adversarial term over updates."""

import pytest

from latentvae.losses.discriminator_config import DiscriminatorConfig
from latentvae.losses.objective.adversarial_weight import AdversarialWeight, adversarial_weight


def test_the_discriminator_learns_before_its_loss_counts() -> None:
    weight = adversarial_weight(DiscriminatorConfig(disc_scale=0.5, disc_ramp_steps=4))
    factors = [weight.factor(update, start=3) for update in range(9)]
    assert factors == [None, None, None, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    off = adversarial_weight(DiscriminatorConfig(disc_scale=0.0))
    assert off.factor(9, start=3) is None and not off.learns_alone(9, start=0)


def test_a_cap_on_sums_follows_the_image_size() -> None:
    """1e4 on sums over 3 x R x R elements is 1e4 / (3 R^2) on means."""
    on_sums = adversarial_weight(DiscriminatorConfig(disc_weight_cap=1e4, disc_cap_on_sums=True))
    assert on_sums.cap_at(3 * 256**2) == pytest.approx(0.050863, rel=1e-4)
    assert on_sums.cap_at(3 * 512**2) == pytest.approx(0.050863 / 4, rel=1e-4)
    assert adversarial_weight(DiscriminatorConfig(disc_weight_cap=2.0)).cap_at(3 * 64**2) == 2.0


def test_the_model_stands_still_in_the_warm_up() -> None:
    weight = AdversarialWeight(scale=0.5, warmup_updates=2, ramp_updates=2)
    assert [weight.learns_alone(u, start=3) for u in range(2, 6)] == [False, True, True, False]
    factors = [weight.factor(update, start=3) for update in range(2, 9)]
    assert factors == [None, 0.0, 0.0, 0.0, 0.25, 0.5, 0.5]
