import itertools

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import FSQ

from latentvae.bottlenecks.fsq import FiniteScalarQuantizer
from latentvae.errors import UserError

LEVELS = [(8, 8, 8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 6, 5), (3, 4), (1000,)]


def features_at(codes: Tensor, levels: tuple[int, ...]) -> Tensor:
    """What the bound maps to codes (B, D, h, w), solved for h in float64."""
    columns = []
    for code, number in zip(codes.double().unbind(1), levels, strict=True):
        half_range = (number - 1) * 1.001 / 2
        offset = 0.5 if number % 2 == 0 else 0.0
        place = (code * (number // 2) + offset) / half_range
        columns.append(torch.atanh(place) - torch.atanh(torch.tensor(offset / half_range)))
    return torch.stack(columns, dim=1).float()


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_and_index_comes_back(levels: tuple[int, ...]) -> None:
    quantiser = FiniteScalarQuantizer(levels)
    indices = torch.arange(quantiser.num_codes).view(1, 1, -1)
    codes = quantiser.codes(indices)
    assert len(codes.unique(dim=2)[0, 0, 0]) == quantiser.num_codes
    found = quantiser(features_at(codes, levels))
    assert found.indices.dtype == torch.int64
    assert torch.equal(found.indices, indices) and torch.equal(found.z, codes)
    assert torch.equal(quantiser.codes(found.indices), found.z)


def test_codes_are_all_combinations_of_even_steps_in_the_papers_order() -> None:
    """Odd levels are symmetric; even ones go from -1 to below 1. The first channel is fastest."""
    quantiser = FiniteScalarQuantizer((4, 3, 5))
    values = [[-1, -0.5, 0, 0.5], [-1, 0, 1], [-1, -0.5, 0, 0.5, 1]]
    expected = [list(reversed(row)) for row in itertools.product(*reversed(values))]
    assert quantiser.codes(torch.arange(60).view(1, 1, 60))[0, :, 0].t().tolist() == expected


@pytest.mark.parametrize("levels", LEVELS)
def test_values_and_gradients_are_those_of_vector_quantize_pytorch(levels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, theirs = FiniteScalarQuantizer(levels), FSQ(list(levels))
    features = (3 * torch.randn(4, len(levels), 16, 16)).requires_grad_()
    found = ours(features)
    z, indices = theirs(features)
    torch.testing.assert_close(found.z, z)
    assert torch.equal(found.indices, indices.long())
    weight = torch.randn_like(features)
    (grad,) = torch.autograd.grad((found.z * weight).sum(), features)
    (expected,) = torch.autograd.grad((z * weight).sum(), features)
    torch.testing.assert_close(grad, expected)
    assert torch.equal(ours.codes(indices.long()), theirs.indices_to_codes(indices))


def test_the_gradient_is_that_of_the_bound() -> None:
    """d z / d h = (L - 1) 1.001 / 2 / floor(L / 2) (1 - tanh(h + s)^2), with s = 0 for odd L."""
    features = torch.randn(2, 2, 5, 5).requires_grad_()
    FiniteScalarQuantizer((5, 3))(features).z.sum().backward()
    expected = 1.001 * (1 - torch.tanh(features.detach()).square())
    torch.testing.assert_close(features.grad, expected)


@pytest.mark.parametrize("levels", LEVELS)
def test_zero_is_the_middle_level_and_extremes_the_outermost(levels: tuple[int, ...]) -> None:
    quantiser = FiniteScalarQuantizer(levels)
    zero = torch.zeros(1, len(levels), 1, 1)
    assert torch.equal(quantiser(zero).z, zero)
    for value, index in ((-1e30, 0), (1e30, quantiser.num_codes - 1)):
        features = (zero + value).requires_grad_()
        found = quantiser(features)
        assert found.indices.item() == index
        found.z.sum().backward()
        assert features.grad is not None and features.grad.isfinite().all()


def test_there_is_nothing_to_learn_or_to_save() -> None:
    quantiser = FiniteScalarQuantizer((8, 5))
    features, generator = torch.randn(9, 2), torch.Generator()
    quantiser.initialise(features, generator=generator)
    found = quantiser(torch.randn(1, 2, 3, 3))
    assert found.losses == {} and found.statistics == {} and quantiser.state_dict() == {}
    assert quantiser.update({}, features=features, generator=generator).item() == 0
    assert (quantiser.num_codes, quantiser.num_levels, quantiser.in_channels) == (40, 1, 2)


@pytest.mark.parametrize(
    ("levels", "said"),
    [((), "one number per channel"), ((8, 2), "use LFQ or BSQ"), ((1001,), "got 1001")],
)
def test_levels_that_cannot_be(levels: tuple[int, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FiniteScalarQuantizer(levels)
