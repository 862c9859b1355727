"""The path from latents to noise, its velocity, and the solvers that follow it back."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from latentvae.errors import UserError
from latentvae.priors.flow_matching import (
    FlowSampling,
    default_shift,
    draw_sigmas,
    even_sigmas,
    gaussian_loss,
    integrate,
    noise_of,
    noised,
    shifted,
)
from latentvae.priors.flow_pipeline import flow_scheduler

STD = 0.4


def gaussian_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact velocity for latents from N(0, STD^2): E[n - x0 | x_sigma]."""
    level = sigma.view(-1, 1, 1, 1)
    covariance = level - (1 - level) * STD**2
    return covariance / (level**2 + (1 - level) ** 2 * STD**2) * x


def test_path_and_shift_are_those_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(shifted(plain.sigmas, 3.0), scheduler.sigmas)

    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    times = plain.timesteps[[100, 900]]
    expected = plain.scale_noise(x, times, noise)
    torch.testing.assert_close(noised(x, noise, times / 1000), expected)


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    x, noise = torch.randn(1, 2, 2, 2).double(), torch.randn(1, 2, 2, 2).double()
    sigma, step = torch.tensor([0.3], dtype=torch.float64), 1e-6
    slope = (noised(x, noise, sigma + step) - noised(x, noise, sigma)) / step
    torch.testing.assert_close(slope, noise - x, atol=1e-8, rtol=0)


def test_noise_levels_have_the_quantiles_of_a_logit_normal() -> None:
    torch.manual_seed(0)
    drawn = draw_sigmas(20_000, shift=2.0).sort().values
    torch.testing.assert_close(drawn[10::20], even_sigmas(1000, shift=2.0), atol=0.03, rtol=0)
    assert even_sigmas(3, shift=1.0)[1] == pytest.approx(0.5)
    assert default_shift(4096) == default_shift(16) == 1.0
    assert default_shift(4 * 4096) == 2.0


def test_the_loss_of_gaussian_values_is_that_of_the_exact_velocity() -> None:
    sigma = even_sigmas(50, shift=1.5)
    torch.manual_seed(0)
    x, noise = STD * torch.randn(50, 1, 100, 100), torch.randn(50, 1, 100, 100)
    errors = gaussian_velocity(noised(x, noise, sigma), sigma) - (noise - x)
    expected = gaussian_loss(torch.tensor([STD**2]), sigma)
    assert errors.square().mean().item() == pytest.approx(expected.item(), rel=0.01)
    # at unit variance and sigma 1/2, x_sigma says nothing about the velocity
    assert gaussian_loss(torch.ones(1), torch.tensor([0.5])).item() == pytest.approx(2.0)


def test_solvers_lead_to_the_latents() -> None:
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = {}
    for solver in ("euler", "heun"):
        options = FlowSampling(steps=20, solver=solver)  # type: ignore[arg-type]
        found = integrate(gaussian_velocity, noise, options=options, shift=1.0)
        errors[solver] = (found - STD * noise).abs().max().item()
    assert errors["euler"] < 0.2
    assert errors["heun"] < errors["euler"] / 4

    # Euler's error falls with the number of steps
    many = integrate(gaussian_velocity, noise, options=FlowSampling(steps=200), shift=1.0)
    assert (many - STD * noise).abs().max() < errors["euler"] / 5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_exported_scheduler_follows_the_same_flow(shift: float) -> None:
    config = flow_scheduler(shift).config
    scheduler = DPMSolverMultistepScheduler.from_config(config, solver_order=1)
    scheduler.set_timesteps(50)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = noise
    for time in scheduler.timesteps:
        v = gaussian_velocity(x, (time / 1000).expand(len(x)))
        x = scheduler.step(v, time, x).prev_sample
    ours = integrate(gaussian_velocity, noise, options=FlowSampling(steps=50), shift=shift)
    torch.testing.assert_close(x, ours, atol=5e-3, rtol=5e-3)


def test_noise_depends_only_on_seed_and_number() -> None:
    many = noise_of((2, 3, 3), seed=1, numbers=range(5))
    assert torch.equal(noise_of((2, 3, 3), seed=1, numbers=[3])[0], many[3])
    assert not torch.equal(noise_of((2, 3, 3), seed=2, numbers=[3])[0], many[3])
    assert abs(noise_of((4, 50, 50), seed=0, numbers=range(2)).std().item() - 1) < 0.02


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"guidance": -1.0}, "guidance must be at least 0"),
        ({"guidance": math.nan}, "guidance must be at least 0"),
        ({"steps": 0}, "steps must be from 1 to 1000"),
        ({"solver": "rk4"}, "solver must be euler or heun"),
    ],
)
def test_wrong_options_are_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        FlowSampling(**values)  # type: ignore[arg-type]
