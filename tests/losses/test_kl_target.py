"""The controller of the KL's weight, on posteriors in closed form."""

import math

import pytest
import torch

from latentvae.losses.objective import Objective
from latentvae.losses.objective.kl_target import BitsTarget, ErrorTarget, KLTarget, kl_target
from latentvae.losses.objective_config import ObjectiveConfig
from latentvae.outputs import AutoencoderOutput, Latent

LATENTS = {"few": ((4, 8, 8), 3 * 64**2), "many": ((16, 4, 4), 3 * 32**2)}  # and image elements


def toy(shape: tuple[int, int, int], pixels: int, options: ObjectiveConfig) -> dict[str, float]:
    """Posteriors N(0, v) under the loss `v + w / pixels * KL`, KL = (v - 1 - log v) / 2 an element,
    least where v / (1 - v) = w r / 2 with r latent elements to a pixel; an update goes a tenth of
    the way there."""
    target = kl_target(options)
    assert target is not None
    logvar, found = torch.full(shape, -3.0), {}
    for update in range(1600):
        kl = 0.5 * (logvar.exp() - 1.0 - logvar).sum()
        found = {
            "latent/kl_bits_per_element": kl / (math.log(2.0) * logvar.numel()),
            "loss/rec": logvar.exp().mean(),
        }
        odds = options.kl_scale * target(update) * logvar.numel() / pixels / 2
        target.follow(target.measured([found]).item())
        logvar = logvar + 0.1 * (math.log(odds / (1 + odds)) - logvar)
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("start", [0.1, 100.0])
@pytest.mark.parametrize("latent", LATENTS)
def test_bits_are_held_from_both_sides_whatever_the_shape(latent: str, start: float) -> None:
    options = ObjectiveConfig(kl_target=1.0, kl_scale=start, kl_target_rate=0.02)
    found = toy(*LATENTS[latent], options)
    assert found["latent/kl_bits_per_element"] == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("latent", LATENTS)
def test_an_error_is_held_from_both_sides_whatever_the_shape(latent: str, start: float) -> None:
    options = ObjectiveConfig(rec_target=0.1, kl_scale=start, kl_target_rate=0.02)
    found = toy(*LATENTS[latent], options)
    assert found["loss/rec"] == pytest.approx(0.1, rel=1e-2)


def test_the_factor_is_on_the_weight_of_the_mean_kl() -> None:
    kl = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    latent = Latent(z=torch.zeros(2, 2, 3, 3), kl=kl.sum(1), kl_per_channel=kl)
    out = AutoencoderOutput(latents=(latent,), output_logvar=torch.zeros(()))
    target = BitsTarget(1.0, kl_scale=0.5, rate=0.01)
    target.log_factor = math.log(3.0)
    objective = Objective(
        rec_loss="l1", perceptual=None, perceptual_scale=0.0, kl_scale=0.5, kl_factor=target
    )
    loss = objective.latent(torch.zeros(2, 3, 2, 2), out, update=0)
    assert loss.weights["loss/kl"] == pytest.approx(0.5 * 3.0)
    assert loss.log["loss/kl"].item() == pytest.approx(5.0 / 12)
    loss.total.backward()
    assert kl.grad is not None and torch.allclose(kl.grad, torch.tensor(1.5 / 2 / 12))


def moved(target: KLTarget, *found: float) -> tuple[float, float]:
    for value in found:
        target.follow(value)
    return target.log_factor, target.error


def test_a_step_is_relative_clipped_and_within_bounds() -> None:
    def fresh(log_factor: float = 0.0, error: float = 0.0) -> KLTarget:
        target = BitsTarget(2.0, kl_scale=1e-4, rate=0.1)
        target.load_state_dict({"log_factor": log_factor, "error": error})
        return target

    assert moved(fresh(0.3), 2.0) == (0.3, 0.0)
    error = math.log(1.5)
    assert moved(fresh(), 3.0) == pytest.approx((2.1 * error, error))  # rate and damping
    assert moved(fresh(0.0, error), 3.0) == pytest.approx((0.1 * error, error))  # the rate alone
    assert moved(fresh(0.0, 1.0), 1e9) == pytest.approx((0.1, 1.0))
    assert moved(fresh(0.0, -1.0), -1e-9) == pytest.approx((-0.1, -1))  # a KL of rounding
    target = fresh()
    factor, _ = moved(target, *[0.0] * 200)
    assert 1e-4 * math.exp(factor) == pytest.approx(1e-8)
    factor, _ = moved(target, *[9.0] * 400)
    assert 1e-4 * math.exp(factor) == pytest.approx(1e4)
    assert target(update=0) == math.exp(factor)


def test_a_step_by_an_error_is_steeper_and_never_far_below_the_start() -> None:
    def fresh(target: float = 0.1) -> KLTarget:
        return ErrorTarget(target, kl_scale=1e-4, rate=0.1)

    target = fresh()
    target.error = 0.3  # there is no damping
    log_factor, error = moved(target, 0.11)
    assert (log_factor, error) == pytest.approx((0.1 * error, -4.0 * math.log(1.1)))
    assert moved(fresh(), 0.05) == pytest.approx((0.1, 1.0))
    assert moved(fresh(1e-80), 0.5)[1] == -1.0
    factor, _ = moved(fresh(), *[0.5] * 50)  # a network that has learned nothing yet
    assert math.exp(factor) == pytest.approx(0.1)


def test_what_is_held_is_the_mean_of_the_micro_steps() -> None:
    logged = [{"loss/rec": torch.tensor(value)} for value in (0.1, 0.3)]
    target = kl_target(ObjectiveConfig(rec_target=0.5))
    assert isinstance(target, ErrorTarget)
    assert target.measured(logged).tolist() == pytest.approx([0.2])
    assert target.measured([]).numel() == 0
    assert kl_target(ObjectiveConfig()) is None


def test_the_state_is_taken_over_whole_or_not_at_all() -> None:
    target, other = (BitsTarget(1.0, kl_scale=1e-2, rate=0.5) for _ in range(2))
    moved(target, 3.0, 2.0)
    other.load_state_dict(target.state_dict())
    assert moved(other, 1.5) == moved(target, 1.5)
    for state in ({}, {"log_factor": 1.0}, {"log_factor": 1.0, "error": 0.0, "more": 0.0}):
        with pytest.raises(ValueError, match="must have log_factor and error"):
            other.load_state_dict(state)
