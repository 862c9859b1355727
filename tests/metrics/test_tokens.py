"""Use of codes against scipy, and of several codebooks each for itself."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from latentvae.metrics.tokens import TokenUsage


def usage_of(*batches: Tensor, num_codes: int) -> TokenUsage:
    usage = TokenUsage(num_codes)
    for batch in batches:
        usage.update(batch)
    return usage


def test_token_usage_equals_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = (torch.rand(10, 16, 16, generator=generator) ** 3 * 300).long()
    result = usage_of(*indices.split(3), num_codes=512).result()
    counts = np.bincount(indices.flatten().numpy(), minlength=512)
    nats = scipy.stats.entropy(counts)
    assert result["tokens"] == 2560
    assert result["num_codes_used"] == np.count_nonzero(counts)
    assert result["usage"] == np.count_nonzero(counts) / 512
    assert result["perplexity"] == pytest.approx(math.exp(nats), rel=1e-12)
    assert result["entropy_bits"] == pytest.approx(nats / math.log(2), rel=1e-12)
    assert result["raw_bits"] == 9.0


def test_a_list_has_the_indices_of_each_codebook() -> None:
    usage = TokenUsage(4, codebooks=2)
    usage.update([torch.zeros(2, 1, 1, dtype=torch.int64), torch.arange(4).view(1, 2, 2)])
    levels = usage.result().get("levels", [])
    assert [(level["tokens"], level["num_codes_used"]) for level in levels] == [(2, 1), (4, 4)]
    with pytest.raises(ValueError):
        usage.update([torch.zeros(2, 1, 1, dtype=torch.int64)])


def test_token_usage_of_even_and_collapsed_codes() -> None:
    even = usage_of(torch.arange(2**18), num_codes=2**18).result()
    assert even["usage"] == 1.0
    assert even["entropy_bits"] == pytest.approx(18, rel=1e-12)
    assert even["perplexity"] == pytest.approx(2**18, rel=1e-9)
    collapsed = usage_of(torch.full((4, 8, 8), 7), num_codes=1024).result()
    assert (collapsed["entropy_bits"], collapsed["perplexity"]) == (0.0, 1.0)
    assert collapsed["num_codes_used"] == 1


def test_token_usage_continues_exactly() -> None:
    indices = torch.randint(0, 40, (6, 4, 4), generator=torch.Generator().manual_seed(0))
    resumed = TokenUsage(40)
    resumed.load_state_dict(usage_of(indices[:2], num_codes=40).state_dict())
    resumed.update(indices[2:])
    assert resumed.result() == usage_of(indices, num_codes=40).result()


def test_codebooks_of_levels_are_counted_apart() -> None:
    """Two levels that use halves of their codes: pooled, all would seem used."""
    levels = [torch.arange(32).view(2, 4, 4) % 8, torch.arange(32).view(2, 4, 4) % 8 + 8]
    indices = torch.stack(levels, dim=1)  # (B, L, h, w)
    pooled = usage_of(indices, num_codes=16).result()
    assert pooled["usage"] == 1.0 and "levels" not in pooled
    apart = TokenUsage(16, codebooks=2)
    for batch in indices.split(1):
        apart.update(batch)
    result = TokenUsage.joined([apart.state_dict()]).result()
    each = [usage_of(level, num_codes=16).result() for level in levels]
    assert result.pop("levels") == each
    assert result == each[0] | {"tokens": 64, "num_codes_used": 16}
    assert (each[0]["usage"], each[0]["tokens"]) == (0.5, 32)
    for wrong in (indices[:, 0], indices.transpose(1, 2)):
        with pytest.raises(ValueError, match=r"must be \(B, 2, h, w\)"):
            apart.update(wrong)


def test_wrong_tokens_are_refused() -> None:
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=r"0\.\.7"):
            usage_of(torch.tensor([[3, wrong]]), num_codes=8)
    with pytest.raises(ValueError, match="at least one token"):
        TokenUsage(8).result()
