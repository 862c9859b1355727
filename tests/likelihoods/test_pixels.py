"""Distributions of discrete pixels: sums, samples, tails and an independent oracle."""

import itertools

import pytest
import torch
from scipy import stats
from torch import Tensor

from latentvae.likelihoods import PIXEL_DISTRIBUTIONS, PixelDistribution, pixel_distribution

CASES = [(name, 1, None) for name in PIXEL_DISTRIBUTIONS]
CASES += [(name, 3, 2 if name == "bernoulli" else 4) for name in PIXEL_DISTRIBUTIONS]


def all_images(levels: int, channels: int) -> Tensor:
    """Every image of one pixel, (levels ** C, C, 1, 1)."""
    values = (2 * torch.arange(levels) / (levels - 1) - 1).tolist()
    return torch.tensor(list(itertools.product(values, repeat=channels)))[..., None, None]


def one_pixel(
    name: str, channels: int, levels: int | None
) -> tuple[PixelDistribution, Tensor, Tensor]:
    pixels = pixel_distribution(name, levels=levels)
    images = all_images(pixels.levels, channels)
    torch.manual_seed(0)
    parameters = torch.randn(1, pixels.num_maps(channels), 1, 1)
    return pixels, images, parameters


@pytest.mark.parametrize(("name", "channels", "levels"), CASES)
@pytest.mark.parametrize("spread", [0.3, 2.0, 30.0])
def test_probabilities_sum_to_one(
    name: str, channels: int, levels: int | None, spread: float
) -> None:
    pixels, images, parameters = one_pixel(name, channels, levels)
    given = (spread * parameters).expand(len(images), -1, -1, -1).clone().requires_grad_()
    log_p = pixels.log_prob(images, given)

    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=2e-4)
    log_p.sum().backward()
    assert given.grad is not None and given.grad.isfinite().all()


@pytest.mark.parametrize(("name", "channels", "levels"), CASES)
def test_samples_have_the_probabilities(name: str, channels: int, levels: int | None) -> None:
    pixels, images, parameters = one_pixel(name, channels, levels)
    generator = torch.Generator().manual_seed(1)
    drawn = pixels.sample(parameters.expand(50_000, -1, -1, -1), generator=generator)

    p = pixels.log_prob(images, parameters.expand(len(images), -1, -1, -1)).exp()
    likely = p.argsort(descending=True)[:16]
    same = [(drawn == images[i]).flatten(1).all(1).float().mean() for i in likely]
    assert torch.stack(same).numpy() == pytest.approx(p[likely].numpy(), abs=0.012)


@pytest.mark.parametrize(
    ("name", "oracle"), [("gaussian", stats.norm), ("discretized_logistic", stats.logistic)]
)
def test_a_bin_has_the_mass_that_scipy_finds(name: str, oracle: stats.rv_continuous) -> None:
    pixels, images, _ = one_pixel(name, 1, None)
    location, log_scale = 0.3, -1.2
    parameters = torch.tensor([location, log_scale]).reshape(1, 2, 1, 1)
    log_p = pixels.log_prob(images, parameters.expand(256, -1, -1, -1))

    edges = torch.cat([images.flatten() - 1 / 255, torch.tensor([float("inf")])]).double()
    edges[0] = -float("inf")
    cdf = oracle.cdf(edges.numpy(), loc=location, scale=torch.tensor(log_scale).double().exp())
    assert log_p.exp().numpy() == pytest.approx(cdf[1:] - cdf[:-1], rel=2e-3, abs=1e-7)


def test_a_mixture_of_one_component_is_the_logistic() -> None:
    from latentvae.likelihoods.mixture import DiscretizedLogisticMixture

    torch.manual_seed(0)
    images = pixel_distribution("gaussian").rounded(torch.rand(2, 1, 5, 4) * 2 - 1)
    parameters = torch.randn(2, 2, 5, 4)
    one = DiscretizedLogisticMixture(components=1)
    logits = torch.zeros(2, 1, 5, 4)
    expected = pixel_distribution("discretized_logistic").log_prob(images, parameters)
    found = one.log_prob(images, torch.cat([logits, parameters], dim=1))
    assert torch.allclose(found, expected, rtol=1e-5)


def test_a_channel_depends_on_the_channels_before_it() -> None:
    from latentvae.likelihoods.mixture import DiscretizedLogisticMixture

    mixture = DiscretizedLogisticMixture(components=1)
    parameters = torch.zeros(1, 10, 1, 1)
    parameters[:, 4:7] = -4.0  # narrow
    parameters[:, 7] = 20.0  # green follows red
    same, other = torch.full((1, 3, 1, 1), 0.0), torch.zeros(1, 3, 1, 1)
    same[:, :2], other[:, 0] = 0.5, 0.5
    same, other = mixture.rounded(same), mixture.rounded(other)
    gap = mixture.log_prob(same, parameters) - mixture.log_prob(other, parameters)
    assert gap.item() > 20


def test_far_values_keep_finite_nats_and_gradients() -> None:
    for name in PIXEL_DISTRIBUTIONS:
        pixels = pixel_distribution(name)
        parameters = torch.full((1, pixels.num_maps(1), 1, 1), 40.0)
        parameters[:, pixels.num_maps(1) // 2 :] = -60.0
        parameters.requires_grad_()
        nats = pixels.log_prob(-torch.ones(1, 1, 1, 1), parameters)
        nats.sum().backward()
        assert nats.isfinite().all()
        assert parameters.grad is not None and parameters.grad.isfinite().all()


def test_the_gradient_of_binary_pixels_is_that_of_the_cross_entropy() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 2, (3, 1, 4, 5)).float() * 2 - 1
    logits = (12 * torch.randn(6, 1, 4, 5)).requires_grad_()
    logits.data[0, 0, 0] = 200.0
    white = ((images + 1) / 2).repeat(2, 1, 1, 1)
    ours = pixel_distribution("bernoulli").log_prob(images, logits)
    theirs = -torch.nn.functional.binary_cross_entropy_with_logits(logits, white, reduction="none")
    theirs = theirs.flatten(1).sum(1)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    weight = torch.randn(6)
    found, expected = (
        torch.autograd.grad((weight * log_p).sum(), logits)[0] for log_p in (ours, theirs)
    )
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", PIXEL_DISTRIBUTIONS)
def test_samples_of_parameters_are_scored_against_their_image(name: str) -> None:
    pixels = pixel_distribution(name)
    torch.manual_seed(0)
    images = pixels.rounded(torch.rand(3, 1, 2, 2) * 2 - 1)
    parameters = torch.randn(6, pixels.num_maps(1), 2, 2)
    both = pixels.log_prob(images, parameters)
    parts = [pixels.log_prob(images, part) for part in parameters.split(3)]
    assert torch.allclose(both, torch.cat(parts), rtol=1e-5)


@pytest.mark.parametrize("name", PIXEL_DISTRIBUTIONS)
def test_autocast_does_not_change_the_likelihood(name: str) -> None:
    pixels = pixel_distribution(name)
    torch.manual_seed(0)
    images = pixels.rounded(torch.rand(3, 1, 9, 9) * 2 - 1)
    parameters = 3 * torch.randn(6, pixels.num_maps(1), 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = pixels.log_prob(images, parameters)
    assert torch.equal(found, pixels.log_prob(images, parameters))
