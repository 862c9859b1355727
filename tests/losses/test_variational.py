"""The loss of VAEs: its bounds, gradients, schedules and forms of the KL."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from latentvae.losses.variational import VariationalConfig, VariationalLoss, balance
from latentvae.models.bound import Bound
from tests.models.dense.test_vector_vae import binary_images, vae


def parts(*, groups: int = 2, samples: int = 3, batch: int = 4) -> Bound:
    torch.manual_seed(0)
    kl = torch.rand(groups, samples, batch) * 4
    return Bound(
        log_likelihood=-50 * torch.rand(samples, batch),
        kl=kl,
        log_ratio=kl + torch.randn(groups, samples, batch),
    )


def loss_of(out: Bound, *, update: int = 0, total: int = 100, **options: Any) -> Tensor:
    return VariationalLoss(VariationalConfig(**options), total=total)(out, update=update)[0]


def test_the_elbo_is_the_default_and_the_weight_changes_only_the_kl() -> None:
    bound = parts()
    assert torch.allclose(loss_of(bound), -bound.elbo().mean())
    more = loss_of(bound, kl_scale=3.0) - loss_of(bound)
    assert torch.allclose(more, 2 * bound.kl.sum(0).mean())


def test_the_importance_bound_is_tighter_and_equal_for_one_sample() -> None:
    bound = parts()
    mean = -bound.log_weights().mean()
    assert loss_of(bound, bound="iwae") < mean
    one = parts(samples=1)
    assert torch.allclose(loss_of(one, bound="iwae"), -one.log_weights().mean())


@pytest.mark.parametrize(
    ("update", "cycles", "expected"),
    [(0, 1, 0.0), (5, 1, 0.5), (10, 1, 1.0), (60, 1, 1.0), (55, 2, 0.5), (60, 2, 1.0)],
)
def test_the_weight_grows_once_or_in_cycles(update: int, cycles: int, expected: float) -> None:
    loss = VariationalLoss(VariationalConfig(kl_warmup_steps=10, kl_cycles=cycles), total=100)
    assert loss.kl_weight(update) == pytest.approx(expected)


def test_a_group_below_its_floor_gets_no_gradient() -> None:
    bound = parts()
    kl = torch.stack([torch.full((3, 4), 0.2), torch.full((3, 4), 5.0)]).requires_grad_()
    bound.kl = kl
    loss = loss_of(bound, free_nats=1.0)
    assert loss.item() == pytest.approx(-bound.log_likelihood.mean().item() + 1.0 + 5.0, rel=1e-6)
    loss.backward()
    assert kl.grad is not None
    assert kl.grad[0].abs().sum() == 0 and kl.grad[1].sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(("value", "sign"), [(2.0, -1.0), (9.0, 1.0)])
def test_a_capacity_pulls_from_both_sides(value: float, sign: float) -> None:
    bound = parts(groups=1)
    kl = torch.full((1, 3, 4), value).requires_grad_()
    bound.kl = kl
    options = {"capacity_nats": 10.0, "capacity_steps": 100, "kl_scale": 2.0}
    loss = loss_of(bound, update=50, **options)  # C = 5
    assert loss.item() == pytest.approx(
        -bound.log_likelihood.mean().item() + 2 * abs(value - 5), rel=1e-6
    )
    loss.backward()
    assert kl.grad is not None and kl.grad.sum().item() == pytest.approx(2 * sign)


def test_balance_weights_have_mean_one_and_follow_the_kl() -> None:
    weights = balance(torch.tensor([0.0, 1.0, 5.0]), [1, 1, 1])
    assert weights.mean().item() == pytest.approx(1.0)
    assert weights[0] < weights[1] < weights[2]
    assert not balance(torch.ones(2, requires_grad=True), [1, 1]).requires_grad
    # The same KL in a group of 49 times as many values counts 49 times less.
    small, large = balance(torch.tensor([5.0, 5.0]), [16, 49 * 16])
    assert (small / large).item() == pytest.approx(49)


def test_dreg_is_the_iwae_gradient_with_less_noise() -> None:
    """The decoder's gradient is equal, the encoder's has the same mean and a smaller spread."""
    net, images = vae("one"), binary_images(2)
    found: dict[str, list[Tensor]] = {"iwae": [], "dreg": []}
    for seed in range(600):
        for kind, gradients in found.items():
            loss = VariationalLoss(VariationalConfig(bound=kind, train_samples=6), total=1)
            torch.manual_seed(seed)
            bound = net(images, samples=6, detach_posterior=loss.detaches_posterior)
            total, values = loss(bound, update=0)
            net.zero_grad()
            total.backward()
            decoder, encoder = net.decoder.last.weight.grad, net.moments.weight.grad
            gradients.append(torch.cat([encoder.flatten(), decoder.flatten()]))
            assert values["loss/total"].item() == pytest.approx(-bound.importance().mean().item())
    iwae, dreg = (torch.stack(gradients) for gradients in found.values())

    split = net.moments.weight.numel()
    assert torch.allclose(iwae[:, split:], dreg[:, split:], atol=1e-5)
    ours, theirs = dreg[:, :split], iwae[:, :split]
    error = (theirs.var(0) / len(theirs) + ours.var(0) / len(ours)).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error + 1e-4).all()
    assert ours.var(0).sum() < theirs.var(0).sum()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bound": "iwae", "kl_scale": 2.0}, "has no separate KL"),
        ({"bound": "dreg"}, "at least 2"),
        ({"free_nats": 1.0, "capacity_nats": 3.0}, "Give only one"),
        ({"kl_cycles": 4}, "needs kl_warmup_steps"),
        ({"kl_balance": True}, "during the KL warm-up only"),
        ({"kl_balance": True, "kl_warmup_steps": 5, "free_nats": 1.0}, "Give only one"),
        ({"capacity_steps": 5}, "no effect without capacity_nats"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VariationalConfig(**options)
