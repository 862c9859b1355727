"""Bounds of VAEs with latent vectors, against sums over all images and integrals over latents."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentvae.models.bound import Bound
from latentvae.models.dense.gaussians import Gaussian
from latentvae.models.dense.network import VectorVAE
from latentvae.models.dense.posterior_flows import build_flow

TINY: dict[str, dict[str, Any]] = {
    "one": {"latent_units": (3,), "hidden_channels": (8,)},
    "two": {"latent_units": (3, 2), "hidden_channels": (8, 6)},
    "conv": {"latent_units": (3,), "hidden_channels": (8,), "block_out_channels": (4, 4)},
    "planar": {"latent_units": (3,), "hidden_channels": (8,), "posterior_flow": "planar"},
    "realnvp": {"latent_units": (3,), "hidden_channels": (8,), "posterior_flow": "realnvp"},
    "iaf": {"latent_units": (3,), "hidden_channels": (8,), "posterior_flow": "iaf"},
}


def vae(
    kind: str, *, height: int = 5, width: int = 6, spread: float = 0.2, **changes: Any
) -> VectorVAE:
    torch.manual_seed(0)
    options = TINY[kind] | {"flow_channels": 16} | changes
    net = VectorVAE(image_height=height, image_width=width, **options).eval()
    # Away from the start, at which flows are the identity.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return net


def binary_images(count: int = 4, *, height: int = 5, width: int = 6) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return (torch.rand(count, 1, height, width, generator=draws) < 0.4).float() * 2 - 1


@pytest.mark.parametrize("kind", TINY)
def test_the_parts_have_their_shapes_and_finite_gradients(kind: str) -> None:
    net, groups = vae(kind), 2 if kind == "two" else 1
    bound: Bound = net(binary_images(), samples=3)
    assert bound.log_likelihood.shape == (3, 4)
    assert bound.kl.shape == bound.log_ratio.shape == (groups, 3, 4)
    assert net.posterior_means(binary_images()).shape == (4, 5 if kind == "two" else 3)
    (-bound.elbo().mean()).backward()
    gradients = [p.grad for p in net.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", ["one", "two", "conv"])
@torch.no_grad()
def test_the_kl_is_the_mean_of_the_log_ratio(kind: str) -> None:
    bound: Bound = vae(kind)(binary_images(), samples=20_000)
    kl, ratio = bound.kl.mean(1), bound.log_ratio.mean(1)
    assert torch.allclose(kl, ratio, rtol=0.05, atol=0.03)
    assert bound.unit_kl is not None
    assert torch.allclose(bound.unit_kl.sum(-1), bound.kl[0].mean(0), rtol=0.02)


@pytest.mark.parametrize("kind", ["one", "two", "iaf", "planar", "realnvp"])
@torch.no_grad()
def test_the_importance_bound_reaches_the_integral(kind: str) -> None:
    """ln p(x) from a grid over the latents, for one or two latents of one unit."""
    units = (1, 1) if kind == "two" else (1,)
    net = vae(kind, height=2, width=3, latent_units=units, spread=0.1)
    images = binary_images(3, height=2, width=3)
    z = torch.linspace(-9, 9, 1201)
    step = (z[1] - z[0]).log()

    prior = Gaussian.standard(z[:, None]).log_prob(z[:, None])  # of the last latent
    if kind == "two":
        conditional = Gaussian.from_moments(net.down[0](z[:, None]))
        joint = conditional.log_prob(z[:, None, None].expand(-1, len(z), 1))
        prior = torch.logsumexp(joint + prior, dim=1) + step
    decoded = net.decoder(z[:, None])
    log_p = torch.stack(
        [net.pixels.log_prob(image.expand(len(z), -1, -1, -1), decoded) for image in images]
    )
    exact = torch.logsumexp(log_p + prior, dim=1) + step

    few, many = (net(images, samples=s) for s in (5, 20_000))
    assert torch.allclose(many.importance(), exact, atol=0.01)
    assert (many.elbo() < exact + 1e-3).all()
    assert few.importance().mean() < exact.mean() + 0.3


@torch.no_grad()
def test_all_images_have_a_probability_of_one() -> None:
    net = vae("two", height=2, width=3)
    images = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6))).reshape(64, 1, 2, 3)
    log_p = net(images, samples=4000).importance()
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", ["planar", "realnvp", "iaf"])
def test_the_log_determinant_is_that_of_the_jacobian(name: Any) -> None:
    torch.manual_seed(0)
    flow = build_flow(name, units=4, context=3, layers=3, width=8)
    assert flow is not None
    z, context = torch.randn(4), torch.randn(3)
    # Parameters of planar layers are small at the start, those of the others 0.
    start, log_det = flow(z, context)
    assert torch.allclose(start, z, atol=1e-5) and abs(log_det.item()) < 1e-5

    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    mapped, log_det = flow(z, context)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, context)[0], z)
    assert not torch.allclose(mapped, z, atol=0.1)
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-4)


def test_the_kl_of_gaussians_is_that_of_torch() -> None:
    torch.manual_seed(0)
    first, second = (Gaussian(torch.randn(3, 4), torch.randn(3, 4)) for _ in range(2))
    ours, theirs = (
        torch.distributions.Normal(g.mean, (0.5 * g.logvar).exp()) for g in (first, second)
    )
    assert torch.allclose(first.kl(second), torch.distributions.kl_divergence(ours, theirs))
    z = torch.randn(3, 4)
    assert torch.allclose(first.log_prob(z), ours.log_prob(z).sum(-1), atol=1e-5)


def test_the_temperature_narrows_the_samples() -> None:
    net = vae("one")
    draws = [torch.Generator().manual_seed(3) for _ in range(3)]
    wide, again, cold = (
        net.sample(200, generator=g, temperature=t)
        for g, t in zip(draws, (1.0, 1.0, 0.1), strict=True)
    )
    assert torch.equal(wide, again)
    assert cold.var(dim=0).mean() < 0.2 * wide.var(dim=0).mean()
    assert wide.shape == (200, 1, 5, 6)
    pixels = net.sample(50, mean=False, generator=draws[0])
    assert set(pixels.unique().tolist()) == {-1.0, 1.0}


def test_a_folder_gives_the_same_network(tmp_path: Any) -> None:
    net = vae("iaf")
    net.save_pretrained(tmp_path)
    loaded = VectorVAE.from_pretrained(tmp_path, use_safetensors=True)
    images = binary_images()
    with torch.no_grad():
        assert torch.equal(net.reconstruct(images), loaded.reconstruct(images))


def test_the_decoder_starts_at_the_mean_image() -> None:
    net = VectorVAE(image_height=5, image_width=6, hidden_channels=(8,), latent_units=(2,))
    with torch.no_grad():
        net.decoder.last.weight.zero_()
    mean = torch.rand(1, 5, 6) * 1.8 - 0.9
    net.start_at(mean)
    assert torch.allclose(net.decode(torch.zeros(1, 2))[0], mean, atol=1e-5)
    assert math.isfinite(net(binary_images()).elbo().sum().item())
