"""The three parts of the KL against densities of torch, closed forms and their sum."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from latentvae.distributed import all_reduce_mean, gather_with_gradient, rank
from latentvae.errors import UserError
from latentvae.losses.total_correlation import (
    measure_kl_parts,
    split_kl,
    stratified_log_weights,
)
from tests.forks import ranks


def make_posteriors(count: int, dimensions: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    logvar = torch.randn(count, dimensions, generator=generator, dtype=torch.float64) / 2 - 1
    noise = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return mean + noise * (logvar / 2).exp(), mean, logvar


def aggregate(mean: Tensor, logvar: Tensor) -> MixtureSameFamily:
    """q(z) of all posteriors, (D,)-valued."""
    parts = Independent(Normal(mean, (logvar / 2).exp()), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(mean), dtype=mean.dtype)), parts)


@pytest.mark.parametrize("sampling", ["stratified", "weighted"])
def test_the_sum_is_one_sample_of_the_kl(sampling) -> None:
    z, mean, logvar = make_posteriors(8)
    parts = split_kl(z, mean, logvar, num_images=1000, sampling=sampling)
    posterior, prior = Normal(mean, (logvar / 2).exp()), Normal(torch.tensor(0.0).double(), 1.0)
    sampled = (posterior.log_prob(z) - prior.log_prob(z)).sum(1)
    assert torch.allclose(parts.total, sampled)


def test_the_parts_of_the_whole_data_set_are_those_of_its_mixture() -> None:
    z, mean, logvar = make_posteriors(12)
    parts = split_kl(z, mean, logvar, num_images=12)
    joint = aggregate(mean, logvar).log_prob(z)
    marginals = sum(aggregate(mean[:, [k]], logvar[:, [k]]).log_prob(z[:, [k]]) for k in range(3))
    own = Normal(mean, (logvar / 2).exp()).log_prob(z).sum(1)
    prior = Normal(torch.tensor(0.0).double(), 1.0).log_prob(z).sum(1)
    assert torch.allclose(parts.information, own - joint)
    assert torch.allclose(parts.total_correlation, joint - marginals)
    assert torch.allclose(parts.dimension_kl, marginals - prior)


def test_weighted_sampling_of_the_whole_data_set_is_off_by_known_constants() -> None:
    z, mean, logvar = make_posteriors(12)
    exact = split_kl(z, mean, logvar, num_images=12)
    found = split_kl(z, mean, logvar, num_images=12, sampling="weighted")
    shift, dimensions = math.log(12), 3
    assert torch.allclose(found.information, exact.information + shift)
    moved = exact.total_correlation + (dimensions - 1) * shift
    assert torch.allclose(found.total_correlation, moved)
    assert torch.allclose(found.dimension_kl, exact.dimension_kl - dimensions * shift)


def test_a_gaussian_aggregate_has_the_closed_form() -> None:
    """q(z) = N(0, S) with posteriors of variance s: MI = 1/2 log det S / s^D, and so on."""
    s, dimensions = 0.2, 2
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    torch.manual_seed(1)
    spread = MultivariateNormal(
        torch.zeros(2).double(), covariance - s * torch.eye(2, dtype=torch.float64)
    )
    mean = spread.sample((3000,))
    logvar = torch.full_like(mean, math.log(s))
    parts = measure_kl_parts(mean, logvar, generator=torch.Generator().manual_seed(0))

    variances = covariance.diagonal()
    information = 0.5 * (covariance.logdet() - dimensions * math.log(s))
    correlation = covariance / (variances[:, None] * variances).sqrt()
    marginal = 0.5 * (variances - variances.log() - 1).sum()
    assert parts.information.item() == pytest.approx(information.item(), abs=0.05)
    expected = -0.5 * correlation.logdet().item()
    assert parts.total_correlation.item() == pytest.approx(expected, abs=0.03)
    assert parts.dimension_kl.item() == pytest.approx(marginal.item(), abs=0.03)


def test_chunks_do_not_matter() -> None:
    _, mean, logvar = make_posteriors(150)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    z = mean + noise * (logvar / 2).exp()
    whole = split_kl(z, mean, logvar, num_images=150)
    parts = measure_kl_parts(mean, logvar, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(parts.information, whole.information.mean())
    assert torch.allclose(parts.total_correlation, whole.total_correlation.mean())
    assert torch.allclose(parts.dimension_kl, whole.dimension_kl.mean())


def test_stratified_sampling_is_the_mean_of_the_papers_over_the_order_of_the_others() -> None:
    """The paper: 1/N for the own image, 1/M for others but the last, (N - M)/(N M) for the last."""
    batch, images = 5, 40
    m = batch - 1
    rows = []
    for last in range(1, batch):
        row = torch.full((batch,), 1 / m, dtype=torch.float64)
        row[0], row[last] = 1 / images, (images - m) / (images * m)
        rows.append(row)
    found = stratified_log_weights(batch, images).exp()
    assert torch.allclose(found[0], torch.stack(rows).mean(0))
    assert torch.allclose(found.sum(1), torch.ones(batch, dtype=torch.float64))


def test_stratified_sampling_estimates_the_density_without_bias() -> None:
    """The mean over all batches with image 0 is the density of the whole data set."""
    z, mean, logvar = make_posteriors(7)
    densities = []
    for others in itertools.combinations(range(1, 7), 3):
        rows = [0, *others]
        parts = split_kl(z[rows], mean[rows], logvar[rows], num_images=7)
        own = Normal(mean[0], (logvar[0] / 2).exp()).log_prob(z[0]).sum()
        densities.append((own - parts.information[0]).exp())
    exact = aggregate(mean, logvar).log_prob(z[0]).exp()
    assert torch.allclose(torch.stack(densities).mean(), exact)


def test_gradients_are_right_and_independent_dimensions_have_no_total_correlation() -> None:
    z, mean, logvar = (t[:4].requires_grad_() for t in make_posteriors(4))

    def total(*inputs: Tensor) -> Tensor:
        return split_kl(*inputs, num_images=50).total_correlation.sum()

    assert torch.autograd.gradcheck(total, (z, mean, logvar))
    same = torch.zeros(6, 3)
    parts = split_kl(torch.randn(6, 3), same, same, num_images=6)
    assert parts.total_correlation.abs().max() < 1e-5 and parts.information.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((4, 2, 1), {"num_images": 9}, r"\(B, D\)"),
        ((4, 2), {"num_images": 3}, r"2 to num_images \(3\)"),
        ((1, 2), {"num_images": 9}, "got 1"),
        ((4, 2), {"num_images": 9, "sampling": "stratifed"}, "did you mean 'stratified'"),
    ],
)
def test_wrong_arguments_are_named(shape, options, said) -> None:
    z = torch.zeros(shape)
    with pytest.raises(UserError, match=said):
        split_kl(z, z, z, **options)


def loss_of(weight: Tensor, images: Tensor, noise: Tensor) -> Tensor:
    """beta-TCVAE's term of a linear encoder, over the images of all ranks."""
    mean = images @ weight
    logvar = mean.sin() - 1
    z = mean + noise * (logvar / 2).exp()
    parts = split_kl(*map(gather_with_gradient, (z, mean, logvar)), num_images=100)
    return parts.information.mean() + 6 * parts.total_correlation.mean()


def test_two_ranks_have_the_gradient_of_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, images, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 3), (8, 5), (8, 3))
    )
    weight.requires_grad_()
    loss = loss_of(weight, images, noise)
    loss.backward()

    def on_a_rank() -> None:
        torch.distributed.init_process_group("gloo")
        own = slice(4 * rank(), 4 * rank() + 4)
        copy = weight.detach().clone().requires_grad_()
        found = loss_of(copy, images[own], noise[own])
        found.backward()
        assert torch.allclose(found, loss)
        assert torch.allclose(all_reduce_mean(copy.grad), weight.grad)  # as DDP does
        assert not torch.allclose(copy.grad, weight.grad)
        torch.distributed.destroy_process_group()

    ranks(on_a_rank, output=tmp_path / "output.txt")


def test_a_few_codes_give_the_parts_of_all_in_the_mean():
    """Also with more images than are compared at once."""
    torch.manual_seed(0)
    mean, logvar = torch.randn(5000, 2), torch.full((5000, 2), -2.0)
    draws = torch.Generator().manual_seed(1)
    few = measure_kl_parts(mean, logvar, codes=400, generator=draws)
    exact = 2 * 0.5 * math.log(1 + math.exp(2.0))  # of N(0, 1) plus noise
    assert few.information.item() == pytest.approx(exact, abs=0.15)
    assert few.total_correlation.item() == pytest.approx(0.0, abs=0.05)
