"""Sampling: cached keys and values, guidance, top-k and top-p, and reproducible images."""

import pytest
import torch

from latentvae.errors import UserError
from latentvae.priors.sampling import Sampling, Steps, draw, sample_tokens
from latentvae.priors.transformer import NO_CLASS, Text, TokenTransformer
from tests.priors.test_transformer import tiny

CLASSES = torch.tensor([0, 1, NO_CLASS])
TEXT = Text(torch.randn(3, 4, 6), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool())


@pytest.mark.parametrize("text", [None, TEXT], ids=["classes", "text"])
@torch.no_grad()
def test_cached_steps_have_the_logits_of_one_pass(text: Text | None) -> None:
    net, indices = tiny(num_classes=2, text_channels=6), torch.randint(11, (3, 10))
    steps = Steps(net, CLASSES, text)
    cached = [steps.logits(None if t == 0 else indices[:, t - 1]) for t in range(10)]
    whole = net(indices, CLASSES, text).logits
    torch.testing.assert_close(torch.stack(cached, dim=1), whole, atol=1e-5, rtol=0)


def test_an_image_depends_on_its_number_and_the_seed_alone() -> None:
    net = tiny(num_classes=2)
    together = sample_tokens(net, CLASSES, seed=3)
    alone = sample_tokens(net, CLASSES[1:2], seed=3, numbers=[1])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together, sample_tokens(net, CLASSES, seed=4))


def test_guidance_moves_the_logits_away_from_the_unconditional_ones() -> None:
    """With an extreme guidance only the difference of the two conditions counts."""
    net = tiny(num_classes=2)
    with torch.no_grad():
        classes = torch.tensor([0, NO_CLASS])
        first = Steps(net, classes).logits(None)
    best = (first[0] - first[1]).argmax()
    drawn = sample_tokens(net, CLASSES[:1], options=Sampling(guidance=1e4))
    assert drawn[0, 0] == best
    plain = sample_tokens(net, CLASSES[:1], options=Sampling(guidance=1.0))
    assert torch.equal(plain, sample_tokens(net, CLASSES[:1]))


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([0.5, 0.2, 0.3]).log().expand(20_000, -1)
    uniform = torch.rand(20_000, dtype=torch.float64)
    counts = torch.bincount(draw(logits, uniform, Sampling()), minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.2, 0.3]), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (Sampling(top_k=1), {3}),
        (Sampling(top_k=2), {0, 3}),
        (Sampling(top_k=9), {0, 1, 2, 3}),
        (Sampling(top_p=0.39), {3}),
        (Sampling(top_p=0.41), {0, 3}),
        (Sampling(top_p=0.71), {0, 2, 3}),
        (Sampling(temperature=0.01), {3}),
    ],
)
def test_unlikely_codes_are_never_drawn(options: Sampling, kept: set[int]) -> None:
    logits = torch.tensor([0.3, 0.1, 0.2, 0.4]).log().expand(400, -1)
    uniform = torch.linspace(1e-9, 1 - 1e-9, 400, dtype=torch.float64)
    assert set(draw(logits, uniform, options).tolist()) == kept


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"guidance": float("nan")}, "guidance must be at least 0"),
        ({"guidance": -1.0}, "guidance must be at least 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, r"top_p .* \(got 1.5\)"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Sampling(**values)  # type: ignore[arg-type]


def test_levels_use_their_own_rows_and_layers() -> None:
    """Token 2 is the first of the second level, so it reads the first level's row of code 5."""
    net: TokenTransformer = tiny()
    assert [net.level_of(place) for place in range(10)] == [0, 0] + [1] * 8
    with torch.no_grad():
        net.tokens.weight[11:] = 0.0  # rows of the second level
        one, other = torch.full((1, 10), 5), torch.full((1, 10), 5)
        other[0, 4] = 7
        assert torch.equal(net(one).logits, net(other).logits)
