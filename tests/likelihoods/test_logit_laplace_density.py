import math

import pytest
import torch
from torch import Tensor

from latentvae.likelihoods import LogitLaplace

likelihood = LogitLaplace()


def nll_at(x: float, *, mu: float, log_b: float) -> float:
    """Of one pixel whose mapped value is x."""
    image = torch.tensor((x - 0.5) / 0.4, dtype=torch.float64).view(1, 1, 1, 1)
    parameters = torch.tensor([mu, log_b], dtype=torch.float64).view(1, 2, 1, 1)
    return likelihood.nll(image, parameters).item()


def random_case() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.rand(2, 3, 4, 5) - 1, torch.randn(2, 6, 4, 5)


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (1.5, -1.0), (-3.0, 0.3), (0.2, -3.0)])
def test_the_density_integrates_to_one(mu: float, log_b: float) -> None:
    """Over x in (0, 1), in steps of y = logit(x), so that dx = x (1 - x) dy."""
    reach = 9 * math.exp(log_b)
    y = torch.linspace(mu - reach, mu + reach, 10_001, dtype=torch.float64)  # mu is one of them
    x = torch.sigmoid(y).view(1, 1, 1, -1)
    parameters = torch.tensor([mu, log_b]).view(1, 2, 1, 1).expand(1, 2, 1, x.shape[-1])
    nll = likelihood.nll((x - 0.5) / 0.4, parameters)
    total = torch.trapezoid((-nll.double()).exp() * x * (1 - x), y)
    assert total.item() == pytest.approx(1 - math.exp(-9), abs=1e-4)


def test_nll_is_the_papers_formula() -> None:
    """1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b) of x = 0.8 u + 0.1, u the pixel in [0, 1]."""
    images, parameters = random_case()
    x = 0.8 * (images.double() + 1) / 2 + 0.1
    mu, b = parameters[:, :3].double(), parameters[:, 3:].double().exp()
    density = 1 / (2 * b * x * (1 - x)) * torch.exp(-(torch.log(x / (1 - x)) - mu).abs() / b)
    found = likelihood.nll(images, parameters)
    assert found.shape == images.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), -density.log(), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_the_slope() -> None:
    """d/d mu = -sign(logit x - mu) / b and d/d ln b = 1 - |logit x - mu| / b, and finite
    differences."""
    images, parameters = random_case()
    parameters.requires_grad_()
    (grad,) = torch.autograd.grad(likelihood.nll(images, parameters).sum(), parameters)
    mu, log_b = parameters.detach().double().chunk(2, dim=1)
    difference = torch.logit(0.5 + 0.4 * images.double()) - mu
    expected = torch.cat([-difference.sign() / log_b.exp(), 1 - difference.abs() / log_b.exp()], 1)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)
    place = {"mu": mu[0, 1, 2, 3].item(), "log_b": log_b[0, 1, 2, 3].item()}
    x = 0.5 + 0.4 * images[0, 1, 2, 3].item()
    for name, slope in zip(place, (grad[0, 1, 2, 3], grad[0, 4, 2, 3]), strict=True):
        up, down = ({**place, name: place[name] + step} for step in (1e-2, -1e-2))
        finite = (nll_at(x, **up) - nll_at(x, **down)) / 2e-2
        assert finite == pytest.approx(slope.item(), rel=1e-3, abs=1e-3)


def test_pixels_come_back_and_what_lies_outside_is_clamped() -> None:
    images = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    x = likelihood.map_pixels(images)
    assert x.min().item() == pytest.approx(0.1) and x.max().item() == pytest.approx(0.9)
    torch.testing.assert_close(likelihood.unmap_pixels(x), images)
    ends = likelihood.unmap_pixels(torch.tensor([0.0, 0.05, 0.95, 1.0]))
    assert ends.tolist() == [-1.0, -1.0, 1.0, 1.0]


def test_the_mean_is_the_image_whose_logits_are_mu() -> None:
    images, _ = random_case()
    mu = torch.logit(0.5 + 0.4 * images)
    log_b = torch.randn_like(mu)
    parameters = torch.cat([mu, log_b], dim=1)
    torch.testing.assert_close(likelihood.mean(parameters), images)
    expected = math.log(2) + log_b + torch.log((0.5 + 0.4 * images) * (0.5 - 0.4 * images))
    torch.testing.assert_close(likelihood.nll(images, parameters), expected, rtol=1e-4, atol=1e-4)


def test_samples_have_the_quantiles_of_the_distribution() -> None:
    """Median sigmoid(mu); logits mu -+ b log 2 are the quartiles: 40,000 draws, 5 deviations."""
    mu, b = 0.4, 0.5
    parameters = torch.tensor([mu, math.log(b)]).view(1, 2, 1, 1).expand(1, 2, 200, 200)
    samples = likelihood.sample(parameters, generator=torch.Generator().manual_seed(0))
    for share, logit in ((0.25, mu - b * math.log(2)), (0.5, mu), (0.75, mu + b * math.log(2))):
        value = (1 / (1 + math.exp(-logit)) - 0.5) / 0.4
        below = (samples < value).double().mean().item()
        assert abs(below - share) < 5 * math.sqrt(share * (1 - share) / 40_000)
    again = likelihood.sample(parameters, generator=torch.Generator().manual_seed(0))
    assert torch.equal(samples, again) and samples.abs().max() <= 1


@pytest.mark.parametrize("value", [0.0, 100.0, -1e20])
def test_extremes_are_finite(value: float) -> None:
    images = torch.tensor([-1.0, 1.0, 0.0]).view(1, 3, 1, 1)
    parameters = torch.full((1, 6, 1, 1), value).requires_grad_()
    nll = likelihood.nll(images, parameters)
    nll.sum().backward()
    assert nll.isfinite().all()
    assert parameters.grad is not None and parameters.grad.isfinite().all()
    assert likelihood.mean(parameters).isfinite().all()
    assert likelihood.sample(parameters).isfinite().all()


def test_ln_b_ends_at_seven() -> None:
    images = torch.zeros(1, 1, 1, 1)
    values = [
        likelihood.nll(images, torch.tensor([0.0, log_b]).view(1, 2, 1, 1)).item()
        for log_b in (-7.0, -50.0, 7.0, 50.0)
    ]
    assert values[0] == values[1] == pytest.approx(math.log(2) - 7 - math.log(4), rel=1e-6)
    assert values[2] == values[3] == pytest.approx(math.log(2) + 7 - math.log(4), rel=1e-6)


def test_float32_under_autocast() -> None:
    images, parameters = random_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = likelihood.nll(images.bfloat16(), parameters.bfloat16())
    assert found.dtype == torch.float32
    exact = likelihood.nll(images.bfloat16().float(), parameters.bfloat16().float())
    assert torch.equal(found, exact)
