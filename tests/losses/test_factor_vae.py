"""FactorVAE's estimate of the total correlation against the closed form of a Gaussian."""

import math

import pytest
import torch

from latentvae.losses.factor_vae import (
    FactorDiscriminator,
    density_ratio_tc,
    factor_discriminator_loss,
    permute_dims,
)


def make_codes(count: int, correlation: float, generator: torch.Generator) -> torch.Tensor:
    first, second = torch.randn(2, count, generator=generator)
    mixed = correlation * first + math.sqrt(1 - correlation**2) * second
    return torch.stack([first, mixed], dim=1)


def test_a_trained_discriminator_knows_the_total_correlation_of_a_gaussian() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = FactorDiscriminator(2, width=48, layers=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(400):
        z, other = (make_codes(512, 0.8, generator) for _ in range(2))
        permuted = permute_dims(other, generator=generator)
        loss = factor_discriminator_loss(network(z), network(permuted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        found = density_ratio_tc(network(make_codes(20_000, 0.8, generator))).item()
        none = density_ratio_tc(network(make_codes(20_000, 0.0, generator))).item()
    exact = -0.5 * math.log(1 - 0.8**2)  # 0.511, of -1/2 log det of the correlation
    assert found == pytest.approx(exact, abs=0.08)
    assert none < 0.1 * exact


def test_each_dimension_is_permuted_on_its_own() -> None:
    z = make_codes(4000, 0.9, torch.Generator().manual_seed(0))
    permuted = permute_dims(z, generator=torch.Generator().manual_seed(1))
    assert torch.equal(permuted.sort(0).values, z.sort(0).values)
    assert abs(torch.corrcoef(permuted.T)[0, 1]) < 0.06 < abs(torch.corrcoef(z.T)[0, 1])
    assert torch.equal(permuted, permute_dims(z, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(permuted, permute_dims(z, generator=torch.Generator().manual_seed(2)))
    z.requires_grad_()
    permute_dims(z).square().sum().backward()
    assert torch.allclose(z.grad, 2 * z)


def test_the_loss_by_hand() -> None:
    joint = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    permuted = torch.tensor([[0.0, 1.0]])
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2, 0, 1)]
    expected = -0.5 * ((math.log(sigmoid[0]) + math.log(sigmoid[1])) / 2 + math.log(sigmoid[2]))
    assert factor_discriminator_loss(joint, permuted).item() == pytest.approx(expected)
    assert density_ratio_tc(joint).item() == pytest.approx(1.0)  # mean of 2 and 0
    zeros = torch.zeros(5, 2)
    assert factor_discriminator_loss(zeros, zeros).item() == pytest.approx(math.log(2))


def test_the_network_is_the_papers() -> None:
    network = FactorDiscriminator(10)
    assert sum(p.numel() for p in network.parameters()) == 11_000 + 5 * 1_001_000 + 2002
    assert network(torch.zeros(3, 10)).shape == (3, 2)
