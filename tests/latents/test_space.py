"""Interpolations end at the latents, and directions that were put into latents are found again."""

import math

import pytest
import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.latents.space import (
    INTERPOLATIONS,
    attribute_direction,
    lerp,
    move_along,
    nearest_latents,
    principal_components,
    slerp,
)

WEIGHTS = torch.tensor([0.0, 0.25, 0.5, 1.0])


def make_latents(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_are_exact(kind, dtype) -> None:
    first, second = make_latents(2, 4, 3, 5).to(dtype)
    steps = INTERPOLATIONS[kind](first, second, WEIGHTS)
    assert steps.shape == (4, 4, 3, 5) and steps.dtype == dtype
    assert torch.equal(steps[0], first) and torch.equal(steps[-1], second)


def test_the_arc_keeps_the_norm_and_turns_evenly() -> None:
    first, second = torch.nn.functional.normalize(make_latents(2, 60)) * 7
    steps = slerp(first, second, torch.linspace(0, 1, 9))
    assert torch.allclose(steps.norm(dim=1), torch.tensor(7.0))
    turns = torch.nn.functional.cosine_similarity(steps[1:], steps[:-1])
    assert torch.allclose(turns, turns[0].expand(8), atol=1e-6)
    assert lerp(first, second, torch.tensor([0.5])).norm() < 6  # the chord


def test_a_quarter_turn_by_hand_and_norms_change_linearly() -> None:
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    half = math.sqrt(0.5)
    assert torch.allclose(
        slerp(first, second, torch.tensor([0.5]))[0], torch.tensor([half, half]) * 3
    )
    assert torch.allclose(lerp(first, second, torch.tensor([0.5]))[0], torch.tensor([1.0, 2.0]))


def test_directions_without_an_arc() -> None:
    first = make_latents(1, 8)[0]
    assert torch.allclose(slerp(first, 2 * first, torch.tensor([0.5]))[0], 1.5 * first)
    assert torch.allclose(slerp(0 * first, first, torch.tensor([0.5]))[0], 0.5 * first)
    with pytest.raises(UserError, match="opposite"):
        slerp(first, -first, WEIGHTS)
    with pytest.raises(UserError, match="one shape"):
        slerp(first, first[:4], WEIGHTS)


def test_neighbours_are_those_that_were_made() -> None:
    latents = make_latents(30, 2, 4, 4) + 100  # far from zero
    queries = latents[[3, 7]] + 0.01 * make_latents(2, 2, 4, 4, seed=1)
    latents[20] = latents[3] + 0.5 * make_latents(1, 2, 4, 4, seed=2)[0]
    similarity, numbers = nearest_latents(queries, latents, count=2)
    assert numbers[:, 0].tolist() == [3, 7] and numbers[0, 1] == 20
    assert (similarity[:, 0] > 0.99).all() and (similarity[:, 0] >= similarity[:, 1]).all()
    plain, _ = nearest_latents(queries, latents, count=30, center=False)
    assert plain.min() > 0.99  # all latents point the same way
    with pytest.raises(UserError, match=r"1\.\.30 \(got 31\)"):
        nearest_latents(queries, latents, count=31)


def test_the_direction_of_a_shift_is_found() -> None:
    shift = make_latents(1, 3, 4, 4, seed=5)[0]
    absent, present = make_latents(2000, 3, 4, 4), make_latents(2000, 3, 4, 4, seed=1) + shift
    attribute = attribute_direction(present, absent)
    assert (attribute.direction - shift).abs().max() < 0.15
    scores = torch.cat([attribute.scores(present), -attribute.scores(absent)])
    assert (scores > 0).float().mean() > 0.99
    assert attribute.scores(present).mean().item() == pytest.approx(0.5, abs=1e-5)

    moved = attribute.apply(absent[0], torch.tensor([-1.0, 0.0, 1.0]))
    assert torch.equal(moved[1], absent[0])
    before = attribute.scores(absent[:1])
    assert torch.allclose(attribute.scores(moved), before + torch.tensor([-1.0, 0.0, 1.0]))


def test_groups_without_a_direction_are_errors() -> None:
    latents = make_latents(3, 5)
    with pytest.raises(UserError, match="same mean"):
        attribute_direction(latents, latents)
    with pytest.raises(UserError, match="two groups"):
        attribute_direction(latents, latents[:0])


def test_components_are_those_of_the_covariance() -> None:
    latents = make_latents(400, 2, 3) * torch.tensor([[5.0, 1, 1], [1, 3, 1]])
    found = principal_components(latents, count=2)
    assert found.directions.shape == (2, 2, 3)
    values, axes = torch.linalg.eigh(torch.cov(latents.flatten(1).T))
    for number in range(2):
        expected = axes[:, -1 - number] * values[-1 - number].sqrt()
        flat = found.directions[number].flatten()
        assert torch.allclose(flat, expected * expected[expected.abs().argmax()].sign(), atol=1e-3)
    assert torch.allclose(found.shares, values.flip(0)[:2] / values.sum(), atol=1e-4)
    with pytest.raises(UserError, match="1 to 2 principal"):
        principal_components(latents[:3], count=3)
    with pytest.raises(UserError, match="all latents are equal"):
        principal_components(torch.ones(4, 2), count=1)


def test_moves_along_directions() -> None:
    latent, directions = make_latents(1, 4)[0], make_latents(2, 4, seed=1)
    moved = move_along(latent, directions, torch.tensor([-2.0, 0.0, 1.0]))
    assert moved.shape == (2, 3, 4)
    assert torch.allclose(moved[1, 0], latent - 2 * directions[1])
    with pytest.raises(UserError, match="do not fit"):
        move_along(latent, directions[:, :3], torch.tensor([0.0]))
