"""What every entry of the table of discriminators keeps, with each of its norms.

A new entry is tested by being in the table. What is particular to one is tested in
tests/losses/test_discriminators.py.
"""

from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from latentvae.errors import UserError
from latentvae.losses.adversarial import GAN_LOSSES, r1_penalty
from latentvae.losses.discriminator_config import DiscriminatorConfig
from latentvae.losses.discriminators import (
    DISCRIMINATORS,
    build_discriminator,
    power_iteration,
    smallest_side,
)

VARIANTS = [(name, norm) for name, kind in DISCRIMINATORS.items() for norm in kind.norms or (None,)]
EVERY = pytest.mark.parametrize(("name", "norm"), VARIANTS)


def build(name: str, norm: str | None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_discriminator(
        name, norm=norm, **{"image_size": (32, 32), "channels": 8, **options}
    )


def pictures(*size: int, count: int = 2, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, *size, generator=generator) * 2 - 1


def test_options_name_the_table() -> None:
    fields = DiscriminatorConfig.model_fields
    assert get_args(fields["disc_type"].annotation) == tuple(DISCRIMINATORS)
    named = {norm for part in get_args(fields["disc_norm"].annotation) for norm in get_args(part)}
    assert named == {norm for kind in DISCRIMINATORS.values() for norm in kind.norms} | {"none"}


@EVERY
def test_options_take_its_norms_and_no_others(name: str, norm: str | None) -> None:
    for allowed in (None, norm, "none"):
        assert DiscriminatorConfig(disc_type=name, disc_norm=allowed).disc_norm == allowed  # pyright: ignore
    with pytest.raises(UserError, match="'batch'"):
        build_discriminator(name, image_size=(32, 32), channels=8, norm="batch")


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("layers", [None, 1, 2])
def test_the_smallest_image_gives_a_logit_and_smaller_is_an_error(
    name: str, layers: int | None
) -> None:
    side = smallest_side(name, layers)
    discriminator = build(name, None, image_size=(side, 99), num_layers=layers)
    assert discriminator(pictures(side, side)).numel() >= 2
    with pytest.raises(UserError, match=f"at least {side} px"):
        build(name, None, image_size=(99, side - 1), num_layers=layers)


@EVERY
@pytest.mark.parametrize("more", [(0, 1), (1, 0), (5, 18)])
def test_odd_sizes_give_finite_logits(name: str, norm: str | None, more: tuple[int, int]) -> None:
    side = smallest_side(name)
    discriminator = build(name, norm, image_size=(side, side), in_channels=1)
    logits = discriminator(pictures(side + more[0], side + more[1], channels=1))
    assert logits.shape[:2] == (2, 1) and logits.ndim == 4
    assert logits.dtype == torch.float32 and logits.isfinite().all()


@EVERY
def test_gradients_are_finite_and_reach_all(name: str, norm: str | None) -> None:
    discriminator, images = build(name, norm), pictures(33, 37).requires_grad_()
    discriminator(images).square().mean().backward()
    for leaf in (images, *discriminator.parameters()):
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()


@EVERY
def test_a_gradients_penalty_has_a_gradient(name: str, norm: str | None) -> None:
    discriminator = build(name, norm)
    penalty = r1_penalty(discriminator, pictures(32, 32))
    penalty.backward()
    assert penalty > 0
    grads = [p.grad for p in discriminator.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


@EVERY
def test_images_are_judged_alone_in_any_mode(name: str, norm: str | None) -> None:
    """No statistics of a batch: not in training, not in a buffer."""
    discriminator, images = build(name, norm), pictures(37, 50, count=3)
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    logits = discriminator.train()(images)
    torch.testing.assert_close(logits[1:2], discriminator(images[1:2]), rtol=1e-4, atol=1e-5)
    assert torch.equal(discriminator.eval()(images), logits)
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())


@EVERY
def test_equal_seeds_give_equal_discriminators(name: str, norm: str | None) -> None:
    images = pictures(32, 32)
    first, second = build(name, norm), build(name, norm)
    for discriminator in (first, second):
        discriminator(images).mean().backward()
        power_iteration(discriminator)
    assert torch.equal(first(images), second(images))
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@EVERY
def test_saved_and_loaded_it_is_the_same(name: str, norm: str | None) -> None:
    discriminator, images = build(name, norm), pictures(32, 32)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(0.01)
    power_iteration(discriminator)
    torch.manual_seed(1)
    other = build_discriminator(name, norm=norm, image_size=(32, 32), channels=8)
    other.load_state_dict(load(save(discriminator.state_dict())))
    assert torch.equal(other(images), discriminator(images))


@EVERY
def test_under_bf16_autocast_the_logits_are_near_those_of_float32(
    name: str, norm: str | None
) -> None:
    discriminator, images = build(name, norm), pictures(32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = discriminator(images)
    logits.float().mean().backward()
    expected = discriminator(images)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max() + 1e-3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())


@EVERY
@pytest.mark.parametrize("loss", GAN_LOSSES)
def test_it_learns_with_every_loss(name: str, norm: str | None, loss: str) -> None:
    discriminator = build(name, norm, image_size=(16, 16), num_layers=1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=5e-3)
    smooth, noise = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(
            GAN_LOSSES[loss].discriminator(*discriminator(torch.cat([smooth, noise])).chunk(2))
        )
        losses[-1].backward()
        optimizer.step()
        power_iteration(discriminator)
    assert losses[-1].item() < 0.5 * losses[0].item()
