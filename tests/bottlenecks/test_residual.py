from typing import Any

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

from latentvae.bottlenecks import Quantizer
from latentvae.bottlenecks.residual import ResidualQuantizer
from latentvae.errors import UserError
from tests.bottlenecks.test_nearest import exact
from tests.bottlenecks.test_vector import flat, seeded


def build(**options: Any) -> ResidualQuantizer:
    """3 levels of 16 codes of 4 channels, spread like the features."""
    shape = {"num_levels": 3, "num_codes": 16, "code_channels": 4}
    quantiser = ResidualQuantizer(**shape | options)
    for level in quantiser.codebooks:
        with torch.no_grad():
            level.weight.normal_()
            if options.get("ema_decay") is not None:
                level.embed_sum.copy_(level.weight)
    return quantiser


def by_hand(features: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B, L, h, w) and partial sums (L, B, D, h, w), float64."""
    left, indices, sums = flat(features).double(), [], []
    for codebook in codebooks.double():
        indices.append(exact(left, codebook))
        left = left - codebook[indices[-1]]
        sums.append(flat(features).double() - left)
    B, D, h, w = features.shape
    shaped = torch.stack(sums).view(-1, B, h, w, D).permute(0, 1, 4, 2, 3)
    return torch.stack(indices).view(-1, B, h, w).transpose(0, 1), shaped


@pytest.mark.parametrize("shared_codebook", [True, False])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_numbers_and_gradients_are_those_of_the_paper(shared_codebook: bool, gradient: str) -> None:
    quantiser = build(shared_codebook=shared_codebook, gradient=gradient)
    contract: Quantizer = quantiser
    features = torch.randn(2, 4, 3, 5, requires_grad=True)
    out = contract(features)
    indices, sums = by_hand(features.detach(), quantiser.codebook.detach())
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.z, sums[-1].float())
    assert torch.equal(contract.codes(out.indices), out.z)
    error = features.detach().double() - sums
    expected = error.square().mean().float()
    assert out.losses.keys() == {"commitment", "codebook"}
    for loss in out.losses.values():
        torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(out.losses["commitment"], features, retain_graph=True)
    torch.testing.assert_close(grad, (2 * error.mean(0) / features.numel()).float())
    upstream = torch.randn_like(out.z)
    (grad,) = torch.autograd.grad(out.z, features, upstream)
    if gradient == "straight_through":
        assert torch.equal(grad, upstream)
    else:  # a rotation and a scaling by |z| / |h|
        scale = flat(out.z).norm(dim=1) / flat(features).norm(dim=1)
        torch.testing.assert_close(flat(grad).norm(dim=1), scale * flat(upstream).norm(dim=1))


def test_equals_vector_quantize_pytorch() -> None:
    ours = build(shared_codebook=False, ema_decay=0.8)
    theirs = ResidualVQ(dim=4, num_quantizers=3, codebook_size=16, decay=0.8, rotation_trick=False)
    for level, their_level in zip(ours.levels, theirs.layers, strict=True):
        their_level.codebook = level.codebook
        their_level._codebook.embed_avg.copy_(level.codebook)
    for _ in range(3):
        features = torch.randn(2, 4, 5, 5)
        out = ours(features)
        z, indices, losses = theirs(features.flatten(2).transpose(1, 2))
        assert torch.equal(out.indices.flatten(2), indices.transpose(1, 2))
        torch.testing.assert_close(out.z.flatten(2), z.transpose(1, 2))
        torch.testing.assert_close(out.losses["commitment"], losses.mean())
        ours.update(out.statistics, features=flat(features), generator=seeded())
        torch.testing.assert_close(ours.codebook, theirs.codebooks)


def test_a_shared_codebook_learns_from_all_levels() -> None:
    quantiser = build(ema_decay=0.9)
    features = torch.randn(2, 4, 5, 5)
    out = quantiser(features)
    indices, sums = by_hand(features, quantiser.codebook)
    partial = torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
    left = flat((features.double() - partial).flatten(0, 1))  # levels, then images
    chosen = torch.eye(16).double()[indices.transpose(0, 1).flatten()]
    torch.testing.assert_close(out.statistics["counts"], chosen.sum(0).float())
    torch.testing.assert_close(out.statistics["sums"], (chosen.T @ left).float())
    size = 0.9 + 0.1 * chosen.sum(0)
    expected = (0.9 * quantiser.codebook[0].double() + 0.1 * chosen.T @ left) / size[:, None]
    quantiser.update(out.statistics, features=flat(features), generator=seeded())
    torch.testing.assert_close(quantiser.codebook[2], expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared_codebook", [True, False])
def test_dead_codes_restart_at_what_is_left_over(shared_codebook: bool) -> None:
    quantiser = build(shared_codebook=shared_codebook, restart_threshold=0.5)
    features = torch.randn(2, 4, 5, 5)
    before = quantiser.codebook.detach()
    statistics = quantiser(features).statistics
    for level in quantiser.codebooks:
        level.usage[3:7] = 0.0
    restarted = quantiser.update(
        {name: 0 * counts for name, counts in statistics.items()},
        features=flat(features),
        generator=seeded(),
    )
    assert restarted == (4 if shared_codebook else 12)
    _, sums = by_hand(features, before)
    partial = torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
    left = torch.stack([flat(level) for level in features.double() - partial]).float()  # (L, N, D)
    candidates = left.flatten(0, 1).expand(3, -1, -1) if shared_codebook else left
    distance = torch.cdist(quantiser.codebook.detach(), candidates).min(2).values
    assert (distance[:, 3:7] < 1e-3).all()
    kept = [0, 1, 2, *range(7, 16)]
    assert torch.equal(quantiser.codebook[:, kept], before[:, kept])


@pytest.mark.parametrize("shared_codebook", [True, False])
def test_k_means_leaves_less_over_at_each_level(shared_codebook: bool) -> None:
    quantiser = ResidualQuantizer(
        num_levels=4, num_codes=64, code_channels=4, shared_codebook=shared_codebook
    )
    features = torch.randn(4, 4, 16, 16)
    quantiser.initialise(flat(features), generator=seeded())
    out = quantiser.eval()(features)
    assert out.statistics == {}
    _, sums = by_hand(features, quantiser.codebook.detach())
    errors = (features.double() - sums).square().mean((1, 2, 3, 4)).tolist()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("shared_codebook", [True, False])
def test_averages_start_at_the_size_of_an_update(shared_codebook: bool) -> None:
    quantiser = ResidualQuantizer(
        num_levels=3,
        num_codes=8,
        code_channels=4,
        shared_codebook=shared_codebook,
        ema_decay=0.9,
    )
    features = torch.randn(4, 4, 8, 8)
    quantiser.initialise(flat(features), generator=seeded(), batch_vectors=32)
    statistics = quantiser(features[:1, :, :4]).statistics  # 32 vectors
    for place, book in enumerate(quantiser.codebooks):
        counts = statistics["counts"] if shared_codebook else statistics["counts"][place]
        torch.testing.assert_close(book.cluster_size.sum(), counts.sum())


def test_no_level_is_refused() -> None:
    with pytest.raises(UserError, match=r"num_levels must be at least 1 \(got 0\)"):
        build(num_levels=0)
