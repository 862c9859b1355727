import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from latentvae.bottlenecks import Quantizer, build_quantizer, nearest_codes
from latentvae.bottlenecks.entropy import code_entropies
from latentvae.bottlenecks.vector import VectorQuantizer
from latentvae.errors import UserError
from tests import forks
from tests.bottlenecks import ranks
from tests.bottlenecks.test_nearest import LargestTensor, exact


def build(**options: Any) -> VectorQuantizer:
    """16 codes of 4 channels, spread like the features."""
    quantiser = VectorQuantizer(**{"num_codes": 16, "code_channels": 4} | options)
    with torch.no_grad():
        quantiser.weight.normal_()
    return quantiser


def flat(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_numbers_are_those_of_the_paper(
    l2_normalize: bool, gradient: str, ema_decay: float | None
) -> None:
    quantiser = build(l2_normalize=l2_normalize, gradient=gradient, ema_decay=ema_decay)
    contract: Quantizer = quantiser
    features = torch.randn(2, 4, 3, 5)
    vectors, codes = flat(features).double(), quantiser.weight.detach().double()
    if l2_normalize:
        vectors, codes = (t / t.norm(dim=1, keepdim=True) for t in (vectors, codes))
    out = contract(features)
    indices = exact(vectors, codes)
    assert torch.equal(out.indices, indices.view(2, 3, 5))
    torch.testing.assert_close(flat(out.z), codes[indices].float())
    assert torch.equal(contract.codes(out.indices), out.z)
    expected = (vectors - codes[indices]).square().mean().float()
    assert out.losses.keys() == {"commitment"} | ({"codebook"} if ema_decay is None else set())
    for loss in out.losses.values():
        torch.testing.assert_close(loss, expected)
    assert quantiser.eval()(features).statistics == {}


def test_commitment_moves_the_features_and_the_codebook_loss_the_codes() -> None:
    quantiser, features = build(), torch.randn(2, 4, 3, 3, requires_grad=True)
    out = quantiser(features)
    quantised = out.z.detach()
    out.losses["commitment"].backward()
    torch.testing.assert_close(features.grad, 2 * (features - quantised).detach() / 72)
    assert quantiser.weight.grad is None
    features.grad = None
    out.losses["codebook"].backward()
    expected = torch.zeros(16, 4)
    for vector, index in zip(flat(features.detach()), out.indices.flatten(), strict=True):
        expected[index] += 2 * (quantiser.weight[index].detach() - vector) / 72
    torch.testing.assert_close(quantiser.weight.grad, expected)
    assert features.grad is None


def test_straight_through_is_the_identity() -> None:
    quantiser, features = build(), torch.randn(2, 4, 3, 3, requires_grad=True)
    upstream = torch.randn(2, 4, 3, 3)
    quantiser(features).z.backward(upstream)
    assert torch.equal(features.grad, upstream)
    assert quantiser.weight.grad is None


def test_rotation_trick_is_the_closed_form_of_the_paper_and_of_vector_quantize_pytorch() -> None:
    quantiser, features = build(gradient="rotation"), torch.randn(2, 4, 3, 3, requires_grad=True)
    upstream = torch.randn(2, 4, 3, 3)
    out = quantiser(features)
    out.z.backward(upstream)
    assert quantiser.weight.grad is None
    assert torch.equal(flat(out.z), quantiser.codebook[out.indices.flatten()])
    rows = (flat(t).detach().double() for t in (features, out.z, upstream, features.grad))
    for vector, quantised, g, found in zip(*rows, strict=True):
        e, q = vector / vector.norm(), quantised / quantised.norm()
        r = (e + q) / (e + q).norm()
        R = torch.eye(4).double() - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)
        scale = quantised.norm() / vector.norm()
        torch.testing.assert_close(R @ R.T, torch.eye(4).double())
        torch.testing.assert_close(scale * R @ vector, quantised)
        torch.testing.assert_close(found, scale * R.T @ g, atol=1e-5, rtol=1e-4)
    theirs = features.detach().requires_grad_()
    rotate_to(flat(theirs), flat(out.z).detach()).backward(flat(upstream))
    torch.testing.assert_close(features.grad, theirs.grad)


@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_extreme_features_stay_finite(l2_normalize: bool, gradient: str) -> None:
    quantiser = build(l2_normalize=l2_normalize, gradient=gradient, entropy_temperature=0.01)
    code = quantiser.codebook[0].detach()
    extremes = torch.stack([torch.zeros(4), torch.full((4,), 1e4), -code, code])
    features = extremes.T.reshape(1, 4, 2, 2).requires_grad_()
    out = quantiser(features)
    (out.z.sum() + sum(out.losses.values())).backward()
    for value in (out.z, *out.losses.values(), features.grad, quantiser.weight.grad):
        assert torch.isfinite(value).all()


def test_moving_average_by_hand() -> None:
    quantiser = build(ema_decay=0.9)
    size, sums = np.ones(16), quantiser.embed_sum.double().numpy().copy()
    for _ in range(3):
        features = torch.randn(2, 4, 3, 3)
        vectors = flat(features).double().numpy()
        indices = exact(flat(features), quantiser.codebook).numpy()
        chosen = np.eye(16)[indices]
        size = 0.9 * size + 0.1 * chosen.sum(0)
        sums = 0.9 * sums + 0.1 * chosen.T @ vectors
        smoothed = (size + 1e-5) / (size.sum() + 16e-5) * size.sum()
        halves = [quantiser(half).statistics for half in features.chunk(2)]
        joined = {name: halves[0][name] + halves[1][name] for name in halves[0]}
        restarted = quantiser.update(joined, features=flat(features), generator=seeded())
        assert restarted == 0
        expected = torch.from_numpy(sums / smoothed[:, None]).float()
        torch.testing.assert_close(quantiser.codebook, expected)


@pytest.mark.parametrize("cosine", [False, True])
def test_equals_vector_quantize_pytorch(cosine: bool) -> None:
    ours = build(ema_decay=0.8, l2_normalize=cosine)
    theirs = VectorQuantize(
        4, 16, decay=0.8, use_cosine_sim=cosine, rotation_trick=False, accept_image_fmap=True
    )
    theirs.codebook = ours.codebook
    theirs._codebook.embed_avg.copy_(ours.codebook)
    ours.embed_sum.copy_(ours.codebook)
    for _ in range(3):
        features = torch.randn(2, 4, 5, 5)
        out = ours(features)
        z, indices, commitment = theirs(features)
        assert torch.equal(out.indices, indices)
        torch.testing.assert_close(out.z, z)
        torch.testing.assert_close(out.losses["commitment"], commitment.squeeze())
        ours.update(out.statistics, features=flat(features), generator=seeded())
        torch.testing.assert_close(ours.codebook, theirs.codebook)


@pytest.mark.parametrize(("vectors", "window"), [(16, 100), (1600, 5), (0, 1600)])
def test_use_is_averaged_over_one_use_at_the_threshold(vectors: int, window: int) -> None:
    """1 / (threshold x mean) updates, but at least 5; without vectors the mean counts as 1 / K."""
    quantiser = build(restart_threshold=0.01)
    counts = torch.zeros(16)
    counts[3] = vectors
    quantiser.update({"counts": counts}, features=torch.zeros(1, 4), generator=seeded())
    decay, start = math.exp(-1 / window), 0.01 * math.e
    torch.testing.assert_close(quantiser.usage[0], torch.tensor(start * decay))
    now = 16.0 if vectors else 0.0
    torch.testing.assert_close(quantiser.usage[3], torch.tensor(start * decay + (1 - decay) * now))


@pytest.mark.parametrize(("mean", "threshold"), [(16.0, 0.01), (0.25, 0.1), (2.0, 0.02)])
def test_a_code_restarts_below_the_threshold_and_not_above(mean: float, threshold: float) -> None:
    """Poisson counts over 400 windows: codes at 10 and 0.1 times the threshold, and at the mean."""
    torch.manual_seed(0)
    quantiser = VectorQuantizer(num_codes=60, code_channels=2, restart_threshold=threshold)
    share = torch.tensor([10 * threshold, 0.1 * threshold, 1.0]).repeat_interleave(20)
    window = max(5.0, 1 / (threshold * mean))
    restarts, start, updates = torch.zeros(60), quantiser.start_usage, int(400 * window)
    rates = mean * share * 60 / share.sum()
    for _ in range(min(updates, 4000)):
        quantiser.update(
            {"counts": torch.poisson(rates)}, features=torch.zeros(99, 2), generator=seeded()
        )
        restarts += quantiser.usage == start
    windows = min(updates, 4000) / window
    assert (restarts[:20] / windows).mean() < 0.002 and restarts[40:].sum() == 0
    assert 0.5 < (restarts[20:40] / windows).mean() <= 1.01


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_dead_codes_restart_at_features(ema_decay: float | None) -> None:
    quantiser = build(ema_decay=ema_decay, restart_threshold=0.1)
    with torch.no_grad():
        quantiser.weight[4:] += 1e3  # never chosen
        if ema_decay is not None:
            quantiser.embed_sum.copy_(quantiser.weight)
    restarted, updates = torch.tensor(0), 0
    while restarted == 0:
        features = torch.randn(2, 4, 3, 3)
        out = quantiser(features)
        vectors = flat(features)
        restarted = quantiser.update(out.statistics, features=vectors, generator=seeded())
        updates += 1
    assert updates == 9  # a window is 16 / (0.1 x 18) = 8.9 updates
    assert restarted == 12
    places = (quantiser.codebook[4:, None] == vectors).all(2).nonzero()
    assert len(places) == 12 and len(places[:, 1].unique()) == 12  # none twice
    after = quantiser(features)
    assert (after.indices >= 4).sum() >= 12
    quantiser.update(after.statistics, features=vectors, generator=seeded())
    torch.testing.assert_close(quantiser.usage.mean(), torch.tensor(1.0), atol=0.8, rtol=0.0)


def test_more_dead_codes_than_features_wait() -> None:
    quantiser = build(restart_threshold=0.5)
    quantiser.usage.zero_()
    counts = torch.zeros(16)
    vectors = torch.randn(5, 4)
    restarted = quantiser.update({"counts": counts}, features=vectors, generator=seeded())
    assert restarted == 5 and (quantiser.usage == 1).sum() == 5  # e x 0.5 is above 1
    assert torch.equal(quantiser.codebook[:5].sort(0).values, vectors.sort(0).values)


def test_no_restart_unless_asked() -> None:
    quantiser = build()
    quantiser.usage.zero_()
    before = quantiser.codebook.clone()
    vectors = torch.randn(5, 4)
    assert quantiser.update({"counts": torch.zeros(16)}, features=vectors, generator=seeded()) == 0
    assert torch.equal(quantiser.codebook, before)


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_k_means_never_moves_away_and_ends_at_the_means(l2_normalize: bool) -> None:
    vectors, inertia = torch.randn(300, 4), []
    scaled = F.normalize(vectors, dim=1) if l2_normalize else vectors
    for iterations in (1, 2, 4, 8, 60):
        quantiser = build(l2_normalize=l2_normalize, kmeans_iterations=iterations)
        quantiser.initialise(vectors, generator=seeded())
        codebook = quantiser.codebook.detach()
        indices = exact(scaled, codebook)
        inertia.append((scaled - codebook[indices]).square().mean().item())
    assert inertia == sorted(inertia, reverse=True) and inertia[-1] < 0.95 * inertia[0]
    means = torch.stack([scaled[indices == code].mean(0) for code in range(16)])
    torch.testing.assert_close(codebook, F.normalize(means, dim=1) if l2_normalize else means)


def test_k_means_fills_empty_clusters_and_is_the_same_again() -> None:
    vectors = torch.cat([torch.zeros(500, 4), torch.randn(100, 4)])  # most starts are equal
    codebooks = []
    for _ in range(2):
        quantiser = VectorQuantizer(num_codes=32, code_channels=4, ema_decay=0.9)
        quantiser.initialise(vectors, generator=seeded(3))
        codebooks.append(quantiser.codebook)
    assert torch.equal(*codebooks)
    assert len(nearest_codes(vectors, codebooks[0]).unique()) >= 24
    few = VectorQuantizer(num_codes=32, code_channels=4)
    few.initialise(vectors[-5:], generator=seeded())
    assert torch.isfinite(few.codebook).all()
    untouched = VectorQuantizer(num_codes=8, code_channels=4, kmeans_iterations=0)
    before = untouched.codebook.detach().clone()
    untouched.initialise(vectors, generator=seeded())
    assert torch.equal(untouched.codebook, before)


@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("batch_vectors", [None, 64])
def test_averages_start_at_the_sums_and_counts_of_the_clusters(
    l2_normalize: bool, batch_vectors: int | None
) -> None:
    vectors = torch.randn(320, 4)
    quantiser = VectorQuantizer(
        num_codes=16,
        code_channels=4,
        ema_decay=0.9,
        l2_normalize=l2_normalize,
        kmeans_iterations=100,  # by then no vector changes its cluster
    )
    quantiser.initialise(vectors, generator=seeded(), batch_vectors=batch_vectors)
    scaled = F.normalize(vectors, dim=1) if l2_normalize else vectors
    chosen = F.one_hot(exact(scaled, quantiser.codebook), 16).double()
    share = 1.0 if batch_vectors is None else 0.2
    torch.testing.assert_close(quantiser.cluster_size, share * chosen.sum(0).float())
    torch.testing.assert_close(quantiser.embed_sum, share * (chosen.t() @ scaled.double()).float())
    means = quantiser.embed_sum / quantiser.cluster_size[:, None]
    expected = F.normalize(means, dim=1) if l2_normalize else means
    torch.testing.assert_close(quantiser.codebook, expected)


def test_an_empty_cluster_has_no_vectors_to_its_name() -> None:
    vectors = torch.eye(4).repeat(5, 1)
    quantiser = VectorQuantizer(num_codes=6, code_channels=4, ema_decay=0.9)
    quantiser.initialise(vectors, generator=seeded())
    assert quantiser.cluster_size.sum() == 20 and (quantiser.cluster_size == 0).sum() == 2
    assert (quantiser.embed_sum[quantiser.cluster_size == 0] == 0).all()
    before = quantiser.codebook.clone()
    nothing = {"counts": torch.zeros(6), "sums": torch.zeros(6, 4)}
    quantiser.update(nothing, features=vectors, generator=seeded())
    torch.testing.assert_close(quantiser.codebook, before)


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
def test_entropies_and_their_gradients_are_those_of_the_whole_matrix(chunk: int) -> None:
    vectors = torch.randn(40, 4, requires_grad=True)
    codebook = torch.randn(16, 4, requires_grad=True)
    sample, batch = code_entropies(vectors, codebook, temperature=0.7, over_ranks=True, chunk=chunk)
    found = [*torch.autograd.grad(sample - 2 * batch, [vectors, codebook]), sample, batch]
    v, c = (t.detach().double().requires_grad_() for t in (vectors, codebook))
    p = torch.softmax(-(v[:, None] - c).square().sum(2) / 0.7, dim=1)
    sample = torch.special.entr(p).sum(1).mean()
    batch = torch.special.entr(p.mean(0)).sum()
    expected = [*torch.autograd.grad(sample - 2 * batch, [v, c]), sample, batch]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float())


def test_entropies_hold_a_chunk_of_probabilities_forwards_and_backwards() -> None:
    vectors, codebook = torch.randn(500, 4, requires_grad=True), torch.randn(400, 4)
    with LargestTensor() as largest:
        sum(
            code_entropies(vectors, codebook, temperature=1.0, over_ranks=False, chunk=8000)
        ).backward()
    assert largest.elements <= 8000


def test_entropies_of_one_and_of_equally_distant_codes() -> None:
    codebook = torch.eye(4)
    centre = torch.zeros(3, 4)
    for vectors, expected in ((centre, (1.0, 1.0)), (codebook * 1e3, (0.0, 1.0))):
        found = code_entropies(vectors, codebook, temperature=1.0, over_ranks=False)
        for value, share in zip(found, expected, strict=True):
            torch.testing.assert_close(value, share * torch.tensor(4.0).log())


def test_options_that_are_wrong() -> None:
    with pytest.raises(UserError, match="did you mean 'rotation'"):
        build(gradient="rotate")
    for num_codes, code_channels in ((0, 4), (16, 0)):
        with pytest.raises(
            UserError, match=f"at least 1 code .*got {num_codes} codes of {code_channels}"
        ):
            VectorQuantizer(num_codes=num_codes, code_channels=code_channels)
    with pytest.raises(UserError, match=r"one of vq, residual, fsq, .* did you mean 'fsq'"):
        build_quantizer("fsqq")
    with pytest.raises(UserError, match="between 0 and 1"):
        build(ema_decay=1.0)


def test_two_ranks_are_one_process_with_the_joined_batch(tmp_path: Path) -> None:
    forks.ranks(
        lambda: ranks.main(tmp_path, int(os.environ["RANK"]), 2), output=tmp_path / "output.txt"
    )
    ranks.main(tmp_path, 0, 1)
    one, first, second = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1")
    )
    assert one.keys() == first.keys() == second.keys()
    assert {"gradient/weight.grad", "ema/embed_sum", "residual/codebooks.1.weight"} <= one.keys()
    assert all(one[f"{name}/restarted"] > 0 for name in ("gradient", "ema", "residual"))
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(
            first[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_an_average_that_nothing_adds_to_stays_where_it_is(l2_normalize: bool) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(
        num_codes=3, code_channels=4, ema_decay=0.9, l2_normalize=l2_normalize
    )
    features = quantizer.codebook[:2].detach().repeat(50, 1)  # the third is never chosen
    counts = torch.tensor([50.0, 50.0, 0.0])
    sums = torch.stack([*(50 * quantizer.codebook[:2]), torch.zeros(4)])
    generator, start = torch.Generator(), quantizer.codebook[2].detach().clone()
    for _ in range(400):
        statistics = {"counts": counts, "sums": sums}
        quantizer.update(statistics, features=features, generator=generator)
    torch.testing.assert_close(quantizer.codebook[2], start, rtol=0.02, atol=0.0)
    if l2_normalize:
        torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(3))
