import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from latentvae.bottlenecks.gumbel import GumbelConfig, GumbelQuantizer
from latentvae.errors import UserError


def gumbel_noise(like: Tensor, *, seed: int) -> Tensor:
    """What the quantiser draws after ``seed``: -log of exponential variables."""
    torch.manual_seed(seed)
    return -torch.empty_like(like).exponential_().log()


def quantiser_and_logits(
    *, straight_through: bool = False, num_codes: int = 7
) -> tuple[GumbelQuantizer, Tensor]:
    torch.manual_seed(0)
    quantiser = GumbelQuantizer(
        num_codes=num_codes, code_channels=3, straight_through=straight_through
    )
    return quantiser, (2 * torch.randn(2, num_codes, 4, 5)).requires_grad_()


def mixed(weights: Tensor, codebook: Tensor) -> Tensor:
    """sum_k weights_k codebook_k, (B, D, h, w)"""
    return (weights.unsqueeze(2) * codebook[None, :, :, None, None]).sum(1)


@pytest.mark.parametrize("temperature", [2.0, 0.3])
def test_the_sample_is_a_softmax_of_noisy_logits(temperature: float) -> None:
    quantiser, logits = quantiser_and_logits()
    weights = ((logits + gumbel_noise(logits, seed=1)) / temperature).softmax(1)
    expected = mixed(weights, quantiser.codebook)
    torch.manual_seed(1)
    z = quantiser(logits, temperature=temperature).z
    torch.testing.assert_close(z, expected)
    leaves, weight = [logits, quantiser.codebook], torch.randn_like(z)
    found = torch.autograd.grad((z * weight).sum(), leaves)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_cold_sample_is_the_code_of_the_largest_noisy_logit() -> None:
    quantiser, logits = quantiser_and_logits()
    largest = (logits + gumbel_noise(logits, seed=1)).argmax(1)
    torch.manual_seed(1)
    z = quantiser(logits, temperature=1e-4).z
    torch.testing.assert_close(z, quantiser.codes(largest))
    hot = quantiser(logits, temperature=1e6).z
    mean = quantiser.codebook.mean(0).view(1, 3, 1, 1).expand_as(hot)
    torch.testing.assert_close(hot, mean, atol=1e-4, rtol=0)


def test_straight_through_gives_one_code_and_the_gradient_of_the_mixture() -> None:
    quantiser, logits = quantiser_and_logits(straight_through=True)
    weights = ((logits + gumbel_noise(logits, seed=1)) / 0.7).softmax(1)
    largest = weights.argmax(1)
    torch.manual_seed(1)
    z = quantiser(logits, temperature=0.7).z
    assert torch.equal(z, quantiser.codes(largest))
    weight = torch.randn_like(z)
    found = torch.autograd.grad((z * weight).sum(), [logits, quantiser.codebook])
    soft = mixed(weights, quantiser.codebook.detach())
    (of_logits,) = torch.autograd.grad((soft * weight).sum(), logits)
    hard = quantiser.codes(largest)
    (of_codebook,) = torch.autograd.grad((hard * weight).sum(), quantiser.codebook)
    torch.testing.assert_close(found, (of_logits, of_codebook), rtol=1e-4, atol=1e-6)


def test_codes_are_drawn_as_often_as_their_probability() -> None:
    """The Gumbel-max trick, at any temperature: 40,000 draws, within 5 standard deviations."""
    quantiser = GumbelQuantizer(num_codes=4, code_channels=1, straight_through=True)
    quantiser.codebook.data = torch.arange(4.0).view(4, 1)
    logits = torch.tensor([0.1, 1.0, -1.0, 2.0]).view(1, 4, 1, 1).expand(1, 4, 200, 200)
    torch.manual_seed(0)
    z = quantiser(logits, temperature=3.0).z
    shares = torch.bincount(z.long().flatten(), minlength=4) / 40_000
    p = logits[0, :, 0, 0].softmax(0)
    assert ((shares - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt()).all()


def test_evaluation_reads_the_largest_logit_and_training_reports_it() -> None:
    quantiser, logits = quantiser_and_logits()
    found = quantiser.eval()(logits)
    assert torch.equal(found.indices, logits.argmax(1)) and found.indices.dtype == torch.int64
    assert torch.equal(found.z, quantiser.codes(found.indices))
    assert torch.equal(quantiser(logits).z, found.z)
    assert torch.equal(found.z[1, :, 2, 3], quantiser.codebook[found.indices[1, 2, 3]])
    assert torch.equal(quantiser.train()(logits, temperature=9.0).indices, found.indices)


def test_kl_is_that_to_the_uniform_prior() -> None:
    quantiser, logits = quantiser_and_logits()
    posterior = Categorical(logits=logits.permute(0, 2, 3, 1))
    prior = Categorical(probs=torch.full((7,), 1 / 7))
    kl = quantiser(logits).losses["kl"]
    torch.testing.assert_close(kl, kl_divergence(posterior, prior).mean())
    (grad,) = torch.autograd.grad(kl, logits)
    q, log_q = logits.softmax(1), logits.log_softmax(1)
    per_token = (q * (log_q + math.log(7))).sum(1, keepdim=True)
    torch.testing.assert_close(grad, q * (log_q + math.log(7) - per_token) / 40)


def test_kl_at_its_limits() -> None:
    quantiser, _ = quantiser_and_logits()
    uniform = torch.full((1, 7, 3, 3), -4.0)
    assert quantiser(uniform).losses["kl"].item() == pytest.approx(0.0, abs=1e-6)
    decided = uniform.clone()
    decided[:, 2] = 1e4
    assert quantiser(decided).losses["kl"].item() == pytest.approx(math.log(7), rel=1e-6)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e4, 1e30])
def test_extremes_are_finite(value: float, straight_through: bool) -> None:
    quantiser, _ = quantiser_and_logits(straight_through=straight_through)
    logits = torch.full((1, 7, 4, 4), -value)
    logits[:, 3] = value
    logits.requires_grad_()
    found = quantiser(logits, temperature=1 / 16)
    (found.z.sum() + found.losses["kl"]).backward()
    assert found.z.isfinite().all() and found.losses["kl"].isfinite()
    for leaf in (logits, quantiser.codebook):
        assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_it_learns_by_gradient_alone() -> None:
    quantiser, logits = quantiser_and_logits()
    before = quantiser.codebook.detach().clone()
    features, generator = torch.randn(9, 7), torch.Generator()
    quantiser.initialise(features, generator=generator)
    statistics = quantiser(logits).statistics
    assert statistics == {}
    assert quantiser.update(statistics, features=features, generator=generator).item() == 0
    assert torch.equal(quantiser.codebook, before)
    assert list(quantiser.state_dict()) == ["codebook"]


def test_the_temperature_falls_along_half_a_cosine() -> None:
    options = GumbelConfig(temperature=1.0, final_temperature=1 / 16, temperature_steps=4)
    values = [options.temperature_at(update) for update in (0, 1, 2, 4, 9)]
    quarter = 1 / 16 + (15 / 16) * 0.5 * (1 + 0.5**0.5)
    assert values == pytest.approx([1.0, quarter, 17 / 32, 1 / 16, 1 / 16])


@pytest.mark.parametrize(("num_codes", "code_channels"), [(1, 4), (4, 0)])
def test_sizes_that_cannot_be(num_codes: int, code_channels: int) -> None:
    with pytest.raises(UserError, match=f"got {num_codes} codes of {code_channels}"):
        GumbelQuantizer(num_codes=num_codes, code_channels=code_channels)
