import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vector_quantize_pytorch import LFQ

from latentvae.bottlenecks import lfq
from latentvae.bottlenecks.lfq import LookupFreeQuantizer
from latentvae.errors import UserError
from tests.bottlenecks.lfq_ranks import joined_batch, losses_and_gradient, main
from tests.forks import ranks


def all_codes(quantiser: LookupFreeQuantizer) -> Tensor:
    """(K, D)"""
    return quantiser.codes(torch.arange(quantiser.num_codes).view(1, 1, -1))[0, :, 0].t()


def probabilities(features: Tensor, codes: Tensor, *, temperature: float) -> Tensor:
    """Softmax over all codes of -|h - c|^2 / t, (N, K), in float64."""
    h = features.permute(0, 2, 3, 1).flatten(0, 2).double()
    distance = (h[:, None] - codes.double()[None]).square().sum(2)
    return (-distance / temperature).softmax(1)


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("num_bits", "indices"), [(18, None), (62, 100_000), (1, None)])
def test_every_code_and_index_comes_back(
    num_bits: int, indices: int | None, spherical: bool
) -> None:
    quantiser = LookupFreeQuantizer(num_bits=num_bits, spherical=spherical).eval()
    some = (
        torch.arange(quantiser.num_codes) if indices is None else torch.randint(2**62, (indices,))
    )
    some = some.view(1, 2, -1)
    codes = quantiser.codes(some)
    torch.testing.assert_close(codes.abs(), torch.full_like(codes, quantiser.scale))
    found = quantiser(codes)
    assert torch.equal(found.indices, some) and torch.equal(found.z, codes)
    assert found.losses["commitment"].item() < 1e-12


def test_the_first_channel_is_the_lowest_bit_and_zero_is_plus_one() -> None:
    quantiser = LookupFreeQuantizer(num_bits=4)
    assert quantiser.state_dict() == {}
    features = torch.tensor([0.3, -2.0, 0.0, -0.1]).view(1, 4, 1, 1)
    found = quantiser(features)
    assert found.indices.tolist() == [[[0b0101]]]
    assert found.z.flatten().tolist() == [1.0, -1.0, 1.0, -1.0]
    on_sphere = LookupFreeQuantizer(num_bits=4, spherical=True)(features)
    assert on_sphere.z.flatten().tolist() == [0.5, -0.5, 0.5, -0.5]


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("group_bits", [5, 9])
def test_entropies_are_those_of_a_softmax_over_all_codes(spherical: bool, group_bits: int) -> None:
    torch.manual_seed(0)
    quantiser = LookupFreeQuantizer(
        num_bits=5, spherical=spherical, entropy_temperature=0.7, group_bits=group_bits
    )
    features = torch.randn(2, 5, 3, 4).requires_grad_()
    h = F.normalize(features, dim=1) if spherical else features
    p = probabilities(h, all_codes(quantiser), temperature=0.7)
    expected = {"sample_entropy": entropy(p).mean(), "batch_entropy": entropy(p.mean(0))}
    losses = quantiser(features).losses
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad(losses[name], features, retain_graph=True)
        (grad_expected,) = torch.autograd.grad(value, features, retain_graph=True)
        torch.testing.assert_close(grad, grad_expected, rtol=1e-4, atol=1e-7)


def test_groups_add_the_entropies_of_their_marginals_a_bound_from_above() -> None:
    torch.manual_seed(0)
    options = {"num_bits": 5, "entropy_temperature": 0.7}
    features = torch.randn(2, 5, 3, 4)
    quantiser = LookupFreeQuantizer(**options, group_bits=2)
    mean = probabilities(features, all_codes(quantiser), temperature=0.7).mean(0)
    mean = mean.view(2, 2, 2, 2, 2)  # the highest bit first
    marginals = [mean.sum((0, 1, 2)), mean.sum((0, 3, 4)), mean.sum((1, 2, 3, 4))]
    expected = sum(entropy(marginal.flatten()) for marginal in marginals)
    value = quantiser(features).losses["batch_entropy"]
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    exact = LookupFreeQuantizer(**options, group_bits=5)(features).losses["batch_entropy"]
    assert exact.item() < value.item() < 5 * math.log(2)


@pytest.mark.parametrize("spherical", [False, True])
def test_values_and_gradients_are_those_of_vector_quantize_pytorch(spherical: bool) -> None:
    """Its first channel is the highest bit."""
    torch.manual_seed(0)
    ours = LookupFreeQuantizer(num_bits=4, spherical=spherical, entropy_temperature=2.0)
    theirs = LFQ(dim=4, codebook_size=16, commitment_loss_weight=1.0, spherical=spherical)
    features = torch.randn(3, 4, 5, 5).requires_grad_()
    found = ours(features)
    out, parts = theirs(features.flip(1), inv_temperature=0.5, return_loss_breakdown=True)
    torch.testing.assert_close(found.z, out.quantized.flip(1))
    assert torch.equal(found.indices, out.indices)
    assert torch.equal(ours.codes(found.indices).flip(1), theirs.indices_to_codes(out.indices))
    pairs = {
        "sample_entropy": parts.per_sample_entropy,
        "batch_entropy": parts.batch_entropy,
        "commitment": parts.commitment,
    }
    weight = torch.randn_like(features)
    outputs = [(found.losses[name], value) for name, value in pairs.items()]
    outputs.append(((found.z * weight).sum(), (out.quantized.flip(1) * weight).sum()))
    for value, expected in outputs:
        torch.testing.assert_close(value, expected)
        (grad,) = torch.autograd.grad(value, features, retain_graph=True)
        (grad_expected,) = torch.autograd.grad(expected, features, retain_graph=True)
        torch.testing.assert_close(grad, grad_expected, rtol=1e-4, atol=1e-6)


def test_codes_that_nothing_is_near_pull_as_much_as_in_vector_quantize_pytorch() -> None:
    """At the usual temperature and 10 bits most codes have shares below 1e-5."""
    torch.manual_seed(0)
    ours, theirs = LookupFreeQuantizer(num_bits=10), LFQ(dim=10)
    features = (0.05 * torch.randn(1, 10, 5, 5)).requires_grad_()
    p = probabilities(features, all_codes(ours), temperature=0.01).mean(0)
    assert 0.5 < (p < 1e-5).double().mean() < 1.0
    _, parts = theirs(features.flip(1), return_loss_breakdown=True)
    value, expected = ours(features).losses["batch_entropy"], parts.batch_entropy
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, features)
    (grad_expected,) = torch.autograd.grad(expected, features)
    torch.testing.assert_close(grad, grad_expected, rtol=1e-4, atol=1e-4)
    assert grad_expected.abs().max() > 1


def test_the_gradient_passes_as_it_is_or_along_the_sphere() -> None:
    features, weight = torch.randn(2, 6, 3, 3).requires_grad_(), torch.randn(2, 6, 3, 3)
    (LookupFreeQuantizer(num_bits=6)(features).z * weight).sum().backward()
    assert torch.equal(features.grad, weight)
    z = LookupFreeQuantizer(num_bits=6, spherical=True)(features).z
    (grad,) = torch.autograd.grad((z * weight).sum(), features)
    norm = features.detach().norm(dim=1, keepdim=True)
    unit = features.detach() / norm
    expected = (weight - unit * (unit * weight).sum(1, keepdim=True)) / norm
    torch.testing.assert_close(grad, expected)


def test_entropies_at_their_limits() -> None:
    """Undecided tokens; decided ones that are all alike; decided ones of all codes."""
    quantiser = LookupFreeQuantizer(num_bits=9)
    everything = 10.0 * all_codes(quantiser).t().reshape(1, 9, 16, 32)
    cases = [
        (torch.zeros(1, 9, 2, 2), 9 * math.log(2), 9 * math.log(2)),
        (torch.full((1, 9, 2, 2), 10.0), 0.0, 0.0),
        (everything, 0.0, 9 * math.log(2)),
    ]
    for features, sample, batch in cases:
        losses = quantiser(features).losses
        assert losses["sample_entropy"].item() == pytest.approx(sample, abs=1e-6)
        assert losses["batch_entropy"].item() == pytest.approx(batch, abs=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-12, 1e4, -1e15])
def test_extremes_are_finite(spherical: bool, value: float) -> None:
    features = torch.full((1, 18, 2, 2), value)
    features[0, 3] = 0.0
    features.requires_grad_()
    found = LookupFreeQuantizer(spherical=spherical)(features)
    (sum(found.losses.values()) + found.z.sum()).backward()
    assert all(loss.isfinite() for loss in found.losses.values())
    assert features.grad is not None and features.grad.isfinite().all()


class Allocated(TorchDispatchMode):
    """Bytes of all results of all operations, as if none was ever freed; and the largest."""

    total = 0
    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.total += leaf.numel() * leaf.element_size()
                self.largest = max(self.largest, leaf.numel())
        return out


def test_a_quarter_million_codes_take_little_memory() -> None:
    """1024 tokens; the table of their probabilities alone would be 1 GiB."""
    features = torch.randn(1, 18, 32, 32).requires_grad_()
    quantiser = LookupFreeQuantizer(num_bits=18)
    with Allocated() as allocated:
        sum(quantiser(features).losses.values()).backward()
    assert features.grad is not None
    assert allocated.total < 20e6
    assert allocated.largest <= 1024 * 64  # tokens times half a group


def test_two_ranks_are_one_with_the_joined_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second rank that holds the other half, in one process."""
    halves = joined_batch().chunk(2)
    probabilities: list[list[Tensor]] = []
    for half in halves:
        seen: list[Tensor] = []

        def watch(p: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(p.detach().clone())
            return p.detach()

        monkeypatch.setattr(lfq, "all_reduce_mean", watch)
        losses_and_gradient(half)
        probabilities.append(seen)
    means = [(first + second) / 2 for first, second in zip(*probabilities, strict=True)]
    found = []
    for half in halves:
        queue = iter(means)
        monkeypatch.setattr(lfq, "all_reduce_mean", lambda p, queue=queue: next(queue))
        found.append(losses_and_gradient(half))
    monkeypatch.undo()
    compare_with_joined(found[0], found[1])


def test_two_processes_are_one_with_the_joined_batch(tmp_path: Path) -> None:
    ranks(lambda: main(tmp_path, int(os.environ["RANK"])), output=tmp_path / "output.txt")
    compare_with_joined(*(load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)))


def compare_with_joined(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    one = losses_and_gradient(joined_batch())
    # DDP takes the mean of the ranks' gradients.
    torch.testing.assert_close(torch.cat([first["grad"], second["grad"]]) / 2, one["grad"])
    for name in ("commitment", "sample_entropy", "batch_entropy"):
        torch.testing.assert_close((first[name] + second[name]) / 2, one[name])
    assert torch.equal(first["batch_entropy"], second["batch_entropy"])
    alone = losses_and_gradient(joined_batch()[:2])["batch_entropy"]
    assert abs(alone - one["batch_entropy"]) > 0.01  # the test would see a rank by itself


def test_in_evaluation_no_rank_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def collective(p: Tensor) -> Tensor:
        raise AssertionError("a rank with one batch more would wait for ever")

    monkeypatch.setattr(lfq, "all_reduce_mean", collective)
    quantiser = LookupFreeQuantizer(num_bits=4)
    assert quantiser.eval()(torch.randn(1, 4, 2, 2)).losses["batch_entropy"] > 0
    with pytest.raises(AssertionError):
        quantiser.train()(torch.randn(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_bits": 0}, "1 to 62"),
        ({"num_bits": 63}, "1 to 62"),
        ({"group_bits": 21}, "1 to 20"),
        ({"entropy_temperature": 0.0}, "above 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LookupFreeQuantizer(**options)
