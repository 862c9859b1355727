"""The flow is invertible, its log-determinant is exact, and its KL is the KL to the prior that it
describes."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from latentvae.bottlenecks.couplings import Coupling, CouplingFlow
from latentvae.bottlenecks.flow import FlowBottleneck
from latentvae.bottlenecks.gaussian import GaussianBottleneck


def learned(channels: int, *, layers: int = 8) -> CouplingFlow:
    """A flow with random weights, far from the identity."""
    torch.manual_seed(0)
    flow = CouplingFlow(channels, layers=layers, width=16)
    for layer in flow.layers:
        torch.nn.init.normal_(layer.last.weight, std=0.2)
        torch.nn.init.normal_(layer.last.bias, std=0.2)
    return flow


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 1)])
def test_the_inverse_gives_the_latent_back(channels: int, size: tuple[int, int]) -> None:
    flow, z = learned(channels), 2.0 * torch.randn(3, channels, *size)
    noise, _ = flow(z)
    torch.testing.assert_close(flow.inverse(noise), z, atol=2e-4, rtol=1e-4)
    assert (noise - z).abs().max() > 0.1 or size == (1, 1)


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_the_log_determinant_is_that_of_the_jacobian(channels: int) -> None:
    flow, z = learned(channels, layers=4), 2.0 * torch.randn(2, channels, 2, 2)
    _, found = flow(z)
    assert found.abs().min() > 0.05
    for own, log_determinant in zip(z, found, strict=True):

        def mapped(flat: Tensor, like: Tensor = own) -> Tensor:
            return flow(flat.reshape(1, *like.shape))[0].flatten()

        jacobian = torch.autograd.functional.jacobian(mapped, own.flatten())
        torch.testing.assert_close(
            torch.linalg.slogdet(jacobian.double()).logabsdet.float(), log_determinant.detach()
        )


@pytest.mark.parametrize("pattern", range(4))
def test_gradients_of_a_coupling_are_those_of_finite_differences(pattern: int) -> None:
    torch.manual_seed(0)
    layer = Coupling(2, 3, pattern=pattern).double()
    torch.nn.init.normal_(layer.last.weight, std=0.3)
    names = [name for name, _ in layer.named_parameters()]

    def call(z: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (z,))

    z = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (z, *layer.parameters()), fast_mode=True)


def test_each_element_is_mapped_by_some_layer_and_kept_by_another() -> None:
    parts = [Coupling(3, 4, pattern=i).mapped_part(torch.zeros(1, 3, 3, 5)) for i in range(4)]
    assert all(torch.equal(parts[i], ~parts[i + 1]) for i in (0, 2))
    assert not torch.equal(parts[0], parts[2])


@pytest.mark.parametrize("logvar", [None, -1.5])
def test_at_the_start_the_kl_is_that_to_the_standard_normal(logvar: float | None) -> None:
    shape = {"latent_channels": 4, "posterior_logvar": logvar}
    gaussian, flow = GaussianBottleneck(**shape), FlowBottleneck(**shape)
    moments = torch.randn(2, 8, 3, 5)
    torch.manual_seed(0)
    expected = gaussian(moments)
    torch.manual_seed(0)
    found = flow(moments)
    assert torch.equal(found.z, expected.z) and torch.equal(found.mean, expected.mean)
    torch.testing.assert_close(found.kl, expected.kl)
    assert found.kl_per_channel is None


def affine(flow: CouplingFlow) -> tuple[Tensor, Tensor]:
    """Make each coupling an affine map that ignores its input. Return mean and deviation of the
    prior, (d,)."""
    shift, scale = torch.tensor([0.5, -1.0]), torch.tensor([0.7, -0.4])
    for layer in flow.layers:
        bias = layer.last.bias.data.view(2, -1)
        bias[:, 0], bias[:, 1] = shift, scale
    log_scale = scale / (1 + (scale / math.log(1e-3)).abs())  # zuko's soft limit
    return -shift / log_scale.exp(), (-log_scale).exp()


def test_the_mean_of_the_kl_and_its_gradient_are_the_closed_form() -> None:
    bottleneck = FlowBottleneck(latent_channels=2, layers=2, width=4)
    mean_of_prior, deviation_of_prior = affine(bottleneck.flow)  # both colours: each element once
    moments = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mean, logvar = moments.chunk(2, dim=1)
    prior = Normal(mean_of_prior.view(2, 1, 1), deviation_of_prior.view(2, 1, 1))
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), prior).sum()

    torch.manual_seed(2)
    found = bottleneck(moments.expand(10_000, -1, -1, -1)).kl
    error = found.std().item() / 100
    assert found.mean().item() == pytest.approx(expected.item(), abs=4 * error)
    assert error < 0.04 * expected.item()

    (exact,) = torch.autograd.grad(expected, moments)
    (estimated,) = torch.autograd.grad(found.mean(), moments)
    torch.testing.assert_close(estimated, exact, atol=0.12, rtol=0.0)


def test_a_flow_learns_a_prior_that_costs_less() -> None:
    """Neighbouring positions are equal, which a standard normal prior does not know."""
    torch.manual_seed(0)
    bottleneck = FlowBottleneck(latent_channels=2, posterior_logvar=-3.0, layers=4, width=16)
    optimizer = torch.optim.Adam(bottleneck.parameters(), lr=5e-3)
    for _ in range(40):
        mean = F.interpolate(torch.randn(32, 2, 1, 1), size=(2, 2))
        found = bottleneck(torch.cat([mean, torch.zeros_like(mean)], dim=1))
        optimizer.zero_grad()
        found.kl.mean().backward()
        optimizer.step()
    standard = GaussianBottleneck(latent_channels=2, posterior_logvar=-3.0)
    moments = torch.cat([mean, torch.zeros_like(mean)], dim=1)
    assert bottleneck(moments).kl.mean() < 0.8 * standard(moments).kl.mean()


def test_without_sampling_the_latent_is_the_mean_and_the_kl_is_estimated() -> None:
    bottleneck, moments = FlowBottleneck(latent_channels=4), torch.randn(2, 8, 3, 5)
    torch.manual_seed(0)
    found = bottleneck(moments, sample=False)
    torch.manual_seed(0)
    assert torch.equal(found.kl, bottleneck(moments).kl)
    assert torch.equal(found.z, moments.chunk(2, dim=1)[0])
