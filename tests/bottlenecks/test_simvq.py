"""SimVQ against vector-quantize-pytorch, whose weights are loaded into ours."""

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import SimVQ as Theirs

from latentvae.bottlenecks.simvq import SimVQ
from latentvae.errors import UserError
from tests.bottlenecks.test_nearest import exact
from tests.bottlenecks.test_vector import flat


def pair(*, gradient: str, num_codes: int = 32, code_channels: int = 6) -> tuple[SimVQ, Theirs]:
    """Both with the same weights."""
    torch.manual_seed(0)
    ours = SimVQ(num_codes=num_codes, code_channels=code_channels, gradient=gradient)
    theirs = Theirs(
        code_channels, num_codes, channel_first=True, rotation_trick=gradient == "rotation"
    )
    theirs.frozen_codebook.copy_(ours.frozen)
    theirs.code_transform.load_state_dict(ours.projection.state_dict())
    return ours, theirs


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_values_and_gradients_are_those_of_vector_quantize_pytorch(gradient: str) -> None:
    ours, theirs = pair(gradient=gradient)
    features = torch.randn(2, 6, 3, 5, requires_grad=True)
    out = ours(features)
    z, indices, commitment = theirs(features)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.z, z)
    loss = out.losses["codebook"] + 0.25 * out.losses["commitment"]
    torch.testing.assert_close(loss, commitment)
    torch.testing.assert_close(ours.codes(indices), theirs.indices_to_codes(indices))

    mine, other = ours.projection.weight, theirs.code_transform.weight
    for found, expected in zip(
        gradients(loss, features, mine), gradients(commitment, features, other), strict=True
    ):
        torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(z)
    found = gradients((out.z * upstream).sum(), features, mine)
    expected = gradients((z * upstream).sum(), features, other)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] is None  # the decoder's gradient passes to the features alone


def test_training_is_that_of_vector_quantize_pytorch() -> None:
    """Twenty updates of the projection, with the features of each update the same for both."""
    ours, theirs = pair(gradient="straight_through")
    steps = [torch.optim.SGD(module.parameters(), lr=0.3) for module in (ours, theirs)]
    for _ in range(20):
        features = torch.randn(2, 6, 4, 4) + 0.5
        losses = (ours(features).losses["codebook"], theirs(features)[2])
        for loss, step in zip(losses, steps, strict=True):
            step.zero_grad()
            loss.backward()
            step.step()
    torch.testing.assert_close(ours.codebook, theirs.codebook)
    assert torch.equal(ours.frozen, theirs.frozen_codebook)


def test_the_nearest_product_is_found_and_listed() -> None:
    ours, _ = pair(gradient="straight_through", num_codes=500)
    features = torch.randn(3, 6, 4, 4)
    codes = ours.frozen.double() @ ours.projection.weight.detach().double().T
    torch.testing.assert_close(ours.listed_codes(), codes.float())
    assert torch.equal(ours(features).indices.flatten(), exact(flat(features), codes))


def test_a_gradient_at_one_code_moves_all() -> None:
    ours, _ = pair(gradient="straight_through")
    before = ours.codebook.detach()
    features = ours.codes(torch.zeros(1, 1, 1, dtype=torch.int64)).detach() * 1.01  # of code 0
    out = ours(features)
    assert out.indices.flatten().tolist() == [0]
    out.losses["codebook"].backward()
    with torch.no_grad():
        ours.projection.weight -= 10.0 * ours.projection.weight.grad
    assert (ours.codebook != before).any(1).all()
    assert [name for name, _ in ours.named_parameters()] == ["projection.weight"]


def test_codes_start_with_variance_one_over_their_width() -> None:
    frozen = SimVQ(num_codes=4096, code_channels=64).frozen
    assert frozen.std().item() == pytest.approx(1 / 8, rel=0.01)
    assert not frozen.requires_grad


def test_sizes_that_cannot_be() -> None:
    for num_codes, code_channels in ((0, 4), (4, 0)):
        with pytest.raises(UserError, match=f"got {num_codes} codes of {code_channels}"):
            SimVQ(num_codes=num_codes, code_channels=code_channels)
    with pytest.raises(UserError, match="did you mean 'rotation'"):
        SimVQ(num_codes=4, code_channels=4, gradient="rotatoin")
