"""Forms of the KL in the loss, against their papers' formulas."""

import math

import pytest
import torch
from torch import Tensor

from latentvae.losses.objective import kl_forms as forms
from latentvae.losses.objective.kl_forms import (
    Capacity,
    FreeBits,
    PlainKL,
    WarmUp,
    capacity,
    capacity_kl,
    free_bits_kl,
    kl_form,
    kl_warmup,
)
from latentvae.losses.objective_config import ObjectiveConfig
from latentvae.outputs import AutoencoderOutput, Latent


def with_other_rank(monkeypatch: pytest.MonkeyPatch, other: Tensor) -> None:
    """As if a second rank held ``other`` where this one holds the tensor it reduces."""
    monkeypatch.setattr(forms, "all_reduce_mean", lambda mine: (mine.detach() + other) / 2)


def test_schedules_are_linear_and_then_stay() -> None:
    assert [kl_warmup(update, 4) for update in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert kl_warmup(0, 0) == 1.0
    assert [capacity(u, target=3.0, growth_updates=2) for u in (0, 1, 2, 5)] == [0, 1.5, 3, 3]
    assert capacity(0, target=3.0, growth_updates=0) == 3.0


def test_free_bits_is_the_papers_sum_of_maxima() -> None:
    kl = torch.tensor([[1.0, 10.0, 0.0], [3.0, 30.0, 0.0]], requires_grad=True)
    bits = 0.5
    floor = 0.5 * math.log(2) * 16  # nats in a channel of 16 positions: 5.545
    value = free_bits_kl(kl, bits=bits, positions=16)
    assert value.item() == pytest.approx(floor + 20.0 + floor)
    (grad,) = torch.autograd.grad(value, kl)
    assert grad.tolist() == [[0.0, 0.5, 0.0], [0.0, 0.5, 0.0]]


def test_no_free_bits_leave_the_kl() -> None:
    kl = torch.rand(5, 4)
    torch.testing.assert_close(free_bits_kl(kl, bits=0.0, positions=9), kl.sum(1).mean())


def test_capacity_draws_the_kl_from_both_sides() -> None:
    target = 2.0 * math.log(2) * 8  # nats: 11.09
    for values, slope in (([10.0, 4.0], -0.5), ([30.0, 20.0], 0.5)):
        kl = torch.tensor(values, requires_grad=True)
        loss = capacity_kl(kl, bits=2.0, elements=8)
        assert loss.item() == pytest.approx(abs(sum(values) / 2 - target), rel=1e-6)
        (grad,) = torch.autograd.grad(loss, kl)
        assert grad.tolist() == [slope, slope]


def test_two_ranks_are_one_with_the_joined_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank alone would bend the other way: the mean over both decides."""
    mine, other = torch.tensor([[1.0, 9.0]]), torch.tensor([[9.0, 1.5]])
    joined = torch.cat([mine, other]).requires_grad_()
    floor = {"bits": 5.1 / math.log(2), "positions": 1}  # 5.1 nats; the channels' means: 5, 5.25
    target = {"bits": 10.4 / math.log(2), "elements": 1}  # 10.4 nats; the images' KL: 10, 10.5
    free, drawn = free_bits_kl(joined, **floor), capacity_kl(joined.sum(1), **target)
    expected = [torch.autograd.grad(value, joined)[0] for value in (free, drawn)]
    values, grads = [[], []], [[], []]
    for rank, (local, elsewhere) in enumerate(((mine, other), (other, mine))):
        local = local.clone().requires_grad_()
        with_other_rank(monkeypatch, elsewhere.mean(0))
        values[0].append(free_bits_kl(local, **floor))
        with_other_rank(monkeypatch, elsewhere.sum(1).mean())
        values[1].append(capacity_kl(local.sum(1), **target))
        for kind in (0, 1):
            grads[kind].append(torch.autograd.grad(values[kind][rank], local)[0] / 2)
    for kind, value in enumerate((free, drawn)):
        torch.testing.assert_close(torch.stack(values[kind]).mean(), value)
        torch.testing.assert_close(torch.cat(grads[kind]), expected[kind])


def test_options_choose_the_form() -> None:
    assert kl_form(ObjectiveConfig()) == PlainKL()
    assert kl_form(ObjectiveConfig(free_bits=0.5)) == FreeBits(0.5)
    assert kl_form(ObjectiveConfig(kl_capacity=2.0, kl_capacity_steps=9)) == Capacity(2.0, 9)
    assert [WarmUp(4)(update) for update in (0, 1, 8)] == [0.0, 0.25, 1.0]


def test_forms_join_all_latents() -> None:
    """Free bits are a floor for each channel of each latent, a capacity is one for all elements."""
    first = torch.tensor([[4.0, 0.0], [6.0, 0.0]], requires_grad=True)  # 2 channels of 3 positions
    second = torch.tensor([9.0, 1.0], requires_grad=True)  # 1 channel of 2 positions, not split
    out = AutoencoderOutput(
        latents=(
            Latent(z=torch.zeros(2, 2, 1, 3), kl=first.sum(1), kl_per_channel=first),
            Latent(z=torch.zeros(2, 1, 1, 2), kl=second),
            Latent(z=torch.zeros(2, 8, 1, 1)),  # without a KL
        )
    )
    bit = math.log(2.0)
    free = FreeBits(1.0)(out, update=0)
    assert free.item() == pytest.approx(5.0 + 3 * bit + 5.0)
    grads = torch.autograd.grad(free, [first, second])
    assert grads[0].tolist() == [[0.5, 0.0], [0.5, 0.0]] and grads[1].tolist() == [0.5, 0.5]
    drawn = Capacity(2.0, growth_updates=4)(out, update=2)  # 1 bit each of 2 * 3 + 2 elements
    assert drawn.item() == pytest.approx(10.0 - 8 * bit)
    assert PlainKL()(out, update=0).tolist() == [13.0, 7.0]
