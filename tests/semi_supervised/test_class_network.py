"""The bounds of M2 against sums by hand and against the exact likelihood."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentvae.likelihoods import PixelDistribution, pixel_distribution
from latentvae.likelihoods.real import RealGaussian
from latentvae.models.dense.class_network import ClassVAE
from latentvae.models.dense.gaussians import Gaussian


def small(
    pixels: PixelDistribution, *, classes: int = 3, units: int = 2, columns: int = 4
) -> ClassVAE:
    torch.manual_seed(0)
    shape = {"image_channels": 1, "image_height": 1, "image_width": columns}
    sizes = {"num_classes": classes, "latent_units": units, "hidden_units": 8}
    net = ClassVAE(**shape, **sizes, pixels=pixels)  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return net


def binary(count: int, columns: int = 4) -> Tensor:
    return 2.0 * torch.randint(2, (count, 1, 1, columns)).float() - 1.0


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every posterior give its mean, so that two computations draw the same latents."""
    monkeypatch.setattr(Gaussian, "sample", lambda self: self.mean)


@pytest.mark.usefixtures("no_noise")
def test_unlabelled_bound_is_the_weighted_sum_and_entropy() -> None:
    net, x = small(pixel_distribution("bernoulli")), binary(5)
    q = net.logits(x).softmax(-1)
    labelled = torch.stack([net.labelled_bound(x, torch.full((5,), k)) for k in range(3)], dim=-1)
    expected = (q * labelled).sum(-1) + torch.distributions.Categorical(q).entropy()
    torch.testing.assert_close(net.unlabelled_bound(x), expected)


@pytest.mark.usefixtures("no_noise")
def test_skipped_classes_leave_a_normalised_posterior() -> None:
    net, x = small(pixel_distribution("bernoulli")), binary(6)
    q = net.logits(x).softmax(-1)
    least = 0.3
    assert 0 < (q < least).sum() < q.numel()
    kept = torch.where(q >= least, q, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    labelled = torch.stack([net.labelled_bound(x, torch.full((6,), k)) for k in range(3)], dim=-1)
    expected = (kept * labelled - torch.special.xlogy(kept, kept)).sum(-1)
    torch.testing.assert_close(net.unlabelled_bound(x, least=least), expected)


@pytest.mark.usefixtures("no_noise")
def test_labelled_bound_by_hand() -> None:
    net, x, y = small(RealGaussian()), torch.randn(5, 1, 1, 4), torch.tensor([0, 1, 2, 0, 1])
    posterior = net.posterior(x, torch.arange(5), y)
    q = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)

    mean, log_scale = net.pixel_parameters(posterior.mean, y).chunk(2, dim=1)
    assert log_scale.abs().max() < 2.0
    log_p = torch.distributions.Normal(mean, log_scale.exp()).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(net.labelled_bound(x, y), log_p - math.log(3.0) - kl)


@torch.no_grad()
def test_bounds_lie_below_the_integrated_likelihood() -> None:
    net = small(pixel_distribution("bernoulli"), classes=2, units=1)
    x = binary(8)
    z = torch.linspace(-8.0, 8.0, 1001)[:, None]
    prior = Gaussian.standard(z).log_prob(z)
    step = math.log(16.0 / 1000)

    joint = []  # ln p(x, y), (8,) for each class
    for k in range(2):
        parameters = net.pixel_parameters(z, torch.full((len(z),), k))
        log_p = torch.stack([net.pixels.log_prob(x[i : i + 1], parameters) for i in range(8)], 1)
        joint.append(torch.logsumexp(log_p + prior[:, None] + step, 0) - math.log(2.0))
    exact = torch.logsumexp(torch.stack(joint), 0)

    many = x.repeat(1000, 1, 1, 1)
    check_below(net.unlabelled_bound(many), exact)
    for k in range(2):
        check_below(net.labelled_bound(many, torch.full((8000,), k)), joint[k])


def check_below(bounds: Tensor, exact: Tensor) -> None:
    """Check the mean of 1,000 drawn bounds of each of 8 images, within 4 standard errors."""
    drawn = bounds.unflatten(0, (1000, 8))
    error = drawn.std(0) / math.sqrt(1000)
    assert (drawn.mean(0) < exact + 4 * error).all()
    assert (drawn.mean(0) > exact - 20.0).all()


@torch.no_grad()
def test_the_parts_with_drawn_classes_average_to_the_bound() -> None:
    """The mean of the ELBO over drawn classes is U(x), and k samples come nearer to ln p(x)."""
    net, x = small(pixel_distribution("bernoulli"), classes=3, units=1), binary(6)
    bound = net(x, samples=20_000)
    sums = net.unlabelled_bound(x.repeat(20_000, 1, 1, 1)).unflatten(0, (20_000, 6))
    with_ratio = bound.log_weights()
    for drawn in (bound.log_likelihood - bound.kl.sum(0), with_ratio):
        error = (drawn.var(0) + sums.var(0)).sqrt() / math.sqrt(20_000)
        assert ((drawn.mean(0) - sums.mean(0)).abs() < 5 * error).all()
    assert (bound.importance() > bound.elbo()).all()
    assert bound.kl.shape == (2, 20_000, 6) and bound.unit_kl.shape == (6, 1)
    torch.testing.assert_close(bound.unit_kl.sum(1), bound.kl[1].mean(0))


@torch.no_grad()
def test_all_probabilities_of_binary_images_sum_to_one() -> None:
    """The exact likelihood that the bounds are compared with is one: it sums to 1 over images."""
    net = small(pixel_distribution("bernoulli"), classes=2, units=1)
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)[:, None, None]
    z = torch.randn(50, 1)
    for k in range(2):
        parameters = net.pixel_parameters(z, torch.full((50,), k))
        sums = sum(net.pixels.log_prob(x[None], parameters).exp() for x in every)
        torch.testing.assert_close(sums, torch.ones(50))


@pytest.mark.parametrize("pixels", [pixel_distribution("bernoulli"), RealGaussian()])
def test_gradients_are_finite_and_reach_every_weight(pixels: PixelDistribution) -> None:
    net = small(pixels)
    net.unlabelled_bound(100.0 * binary(5)).sum().backward()
    net.labelled_bound(binary(5), torch.tensor([0, 1, 2, 0, 1])).sum().backward()
    for name, weight in net.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_the_class_reaches_the_decoder() -> None:
    net = small(pixel_distribution("bernoulli"))
    z = torch.randn(1, 2).expand(3, 2)
    parameters = net.pixel_parameters(z, torch.arange(3)).flatten(1)
    assert torch.pdist(parameters).min() > 1e-3

    # its columns of the first weight are what differs
    first: Any = next(net.decoder.layers.children())
    with torch.no_grad():
        first.weight[:, 2:] = 0.0
    same = net.pixel_parameters(z, torch.arange(3)).flatten(1)
    torch.testing.assert_close(same[0], same[2])


def test_the_class_reaches_the_posterior() -> None:
    net, x = small(pixel_distribution("bernoulli")), binary(1)
    means = net.posterior(x, torch.zeros(3, dtype=torch.long), torch.arange(3)).mean
    assert torch.pdist(means).min() > 1e-3
