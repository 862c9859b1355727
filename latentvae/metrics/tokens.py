"""Measure how many codes of a tokenizer occur in its tokens, and how evenly."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor


class LevelReport(TypedDict):
    """Statistics of how often the tokens use the codes of one codebook."""

    tokens: int
    num_codes_used: int
    usage: float  # share of the K codes that occur
    perplexity: float  # 1 to K: number of equally used codes that have this entropy
    entropy_bits: float  # per token. Biased low unless there are many more tokens than K.
    raw_bits: float  # per token, log2 K


class TokenReport(LevelReport):
    """Statistics of all codebooks of a tokenizer together.

    `tokens` and `num_codes_used` are sums over codebooks. All other numbers of the report are means
    over codebooks.
    """

    levels: NotRequired[list[LevelReport]]  # statistics of each codebook, if there are several


class TokenUsage:
    """Measures how evenly the codes of one or several codebooks are used, over batches.

        usage = TokenUsage(num_codes=8192)
        usage.update(indices)  # any shape

    Args:
        num_codes: K, the number of codes of each codebook.
        codebooks: L, the number of codebooks. With several codebooks, level l of indices (B, L, h,
            w) belongs to codebook l. `update` also takes a list with the indices of each codebook.
    """

    def __init__(self, num_codes: int, *, codebooks: int = 1) -> None:
        self._counts = torch.zeros(codebooks, num_codes, dtype=torch.int64)

    def update(self, indices: Tensor | Sequence[Tensor]) -> None:
        """Add the code indices of a batch, which are integers in 0..K - 1.

        Args:
            indices: code indices of any shape for one codebook, or (B, L, h, w) for L codebooks. A
                list of L tensors of any shape, one for each codebook, is possible too.
        """
        codebooks, num_codes = self._counts.shape
        for counts, part in zip(self._counts, _by_codebook(indices, codebooks), strict=True):
            flat = part.detach().cpu().flatten()
            if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < num_codes:
                seen = f"{int(flat.min())}..{int(flat.max())}"
                raise ValueError(f"Indices must be in 0..{num_codes - 1} (got {seen}).")
            counts += torch.bincount(flat, minlength=num_codes)

    def result(self) -> TokenReport:
        """Return the statistics of all codebooks together, and of each codebook if L > 1."""
        levels = [_level_report(counts) for counts in self._counts]
        if len(levels) == 1:
            return {**levels[0]}
        return {
            "tokens": sum(level["tokens"] for level in levels),
            "num_codes_used": sum(level["num_codes_used"] for level in levels),
            "usage": fmean(level["usage"] for level in levels),
            "perplexity": fmean(level["perplexity"] for level in levels),
            "entropy_bits": fmean(level["entropy_bits"] for level in levels),
            "raw_bits": levels[0]["raw_bits"],
            "levels": levels,
        }

    @classmethod
    def joined(cls, states: Sequence[dict[str, np.ndarray]]) -> "TokenUsage":
        """Return a `TokenUsage` that holds the summed counts of several state dicts."""
        codebooks, num_codes = states[0]["counts"].shape
        total = cls(num_codes, codebooks=codebooks)
        for state in states:
            total._counts += torch.from_numpy(state["counts"])
        return total

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a dict with the entry "counts": how often each code of each codebook occurs."""
        return {"counts": self._counts.numpy().copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Set the counts to the values that `state_dict` returned."""
        self._counts = torch.from_numpy(state["counts"].copy())


def _by_codebook(indices: Tensor | Sequence[Tensor], codebooks: int) -> Sequence[Tensor]:
    if not isinstance(indices, Tensor):
        return indices
    if codebooks == 1:
        return [indices]
    if indices.ndim != 4 or indices.shape[1] != codebooks:
        shape = tuple(indices.shape)
        raise ValueError(
            f"Indices of {codebooks} codebooks must be (B, {codebooks}, h, w) (got {shape})."
        )
    return indices.unbind(1)


def _level_report(counts: Tensor) -> LevelReport:
    tokens, used = int(counts.sum()), counts[counts > 0]
    if tokens == 0:
        raise ValueError("Statistics of codes need at least one token (got none).")
    share = used.double() / tokens
    nats = -(share * share.log()).sum().item()
    return {
        "tokens": tokens,
        "num_codes_used": len(used),
        "usage": len(used) / len(counts),
        "perplexity": math.exp(nats),
        "entropy_bits": max(0.0, nats / math.log(2)),
        "raw_bits": math.log2(len(counts)),
    }
