"""True bits of a tokenizer's indices: adaptive arithmetic coding, nothing known beforehand.

    content = encode_tokens(indices, num_codes=16384)  # int (h, w)
    indices = decode_tokens(content)                   # int64 (h, w), from the bytes alone

Order 0: encoder and decoder alike count the codes seen so far and take (count + a) / (n + a K) for
the next, the mean under a symmetric Dirichlet prior (Krichevsky and Trofimov 1981 for a = 1/2,
https://doi.org/10.1109/TIT.1981.1056331). `a` is the one of a short list that costs this image
least; with few tokens of many codes that may be the uniform code. Counts are brought up to date
after blocks of an eighth of what is known, so that the work is K log n and not K n.

`K` codes, `n` tokens.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]  # compiled
from numpy.typing import NDArray

from latentvae.coding.bitstream import Integers, damaged, decode_symbols, pack, unpack
from latentvae.errors import UserError

TOKEN_MAGIC = b"LVT\x01"  # the last byte is the format's version
MAX_CODES = 2**20
MAX_TOKENS = 2**24
CONCENTRATIONS = tuple(4.0**k for k in range(1, -10, -1))  # `a`; choice 0 of a file is uniform


def encode_tokens(indices: NDArray[np.integer], *, num_codes: int) -> bytes:
    """One image's tokens as a file of its own; its bits are 8 * len().

    Args:
        indices: 1 to 3 dimensions, each in 0..num_codes - 1.
        num_codes: K, at most 2**20.

    Raises:
        ValueError: something else than such indices.
        UserError: too many codes or tokens.
    """
    if not 1 <= num_codes <= MAX_CODES:
        raise UserError(f"tokens of 1 to {MAX_CODES} codes can be encoded, not of {num_codes}")
    if indices.ndim not in (1, 2, 3) or indices.size == 0 or indices.dtype.kind not in "iu":
        raise ValueError(f"tokens are integers (n), (h, w) or (l, h, w), not {indices.shape}")
    if indices.size > MAX_TOKENS:
        raise UserError(f"at most {MAX_TOKENS} tokens can be encoded, not {indices.size}")
    if indices.min() < 0 or indices.max() >= num_codes:
        found = f"{indices.min()}..{indices.max()}"
        raise ValueError(f"tokens of {num_codes} codes are in 0..{num_codes - 1}, not {found}")
    tokens = indices.reshape(-1).astype(np.int64)
    choice = _cheapest(tokens, num_codes)
    coder = stream.queue.RangeEncoder()
    model = _Model(num_codes, choice)
    for block in _blocks(len(tokens)):
        if num_codes > 1:
            coder.encode(tokens[block].astype(np.int32), model.current())
        model.update(tokens[block])
    return pack(TOKEN_MAGIC, [num_codes, choice, *indices.shape], coder)


def decode_tokens(content: bytes) -> Integers:
    """The tokens of a file of `encode_tokens`, in their shape.

    Raises:
        UserError: the bytes are damaged, cut short or something else.
    """
    numbers, coder = unpack(TOKEN_MAGIC, content)
    if not 3 <= len(numbers) <= 5:
        raise damaged()
    num_codes, choice, *shape = numbers
    count = math.prod(shape)
    if not (1 <= num_codes <= MAX_CODES and 1 <= count <= MAX_TOKENS):
        raise damaged()
    if choice > len(CONCENTRATIONS):
        raise damaged()
    tokens = np.zeros(count, np.int64)
    model = _Model(num_codes, choice)
    for block in _blocks(count):
        if num_codes > 1:
            tokens[block] = decode_symbols(coder, model.current(), block.stop - block.start)
        model.update(tokens[block])
    if not coder.maybe_exhausted():
        raise damaged()
    return tokens.reshape(shape)


class _Model:
    """What encoder and decoder expect of the next block."""

    def __init__(self, num_codes: int, choice: int) -> None:
        self._concentration = CONCENTRATIONS[choice - 1] if choice else None
        self._counts = np.zeros(num_codes, np.int64)

    def current(self) -> Any:
        if self._concentration is None:
            return stream.model.Uniform(len(self._counts))
        weights = self._counts + self._concentration  # normalised by constriction
        return stream.model.Categorical(weights, perfect=False)

    def update(self, tokens: Integers) -> None:
        np.add.at(self._counts, tokens, 1)


def _blocks(count: int) -> Iterator[slice]:
    """Each an eighth of what comes before it, at first one token."""
    start = 0
    while start < count:
        stop = min(count, start + max(1, start // 8))
        yield slice(start, stop)
        start = stop


def _cheapest(tokens: Integers, num_codes: int) -> int:
    """The choice of concentration that costs fewest bits; 0, uniform, if none gains."""
    counts = np.zeros(num_codes, np.int64)
    seen, total = np.empty(len(tokens)), np.empty(len(tokens))  # of its code, of all: per token
    for block in _blocks(len(tokens)):
        seen[block], total[block] = counts[tokens[block]], block.start
        np.add.at(counts, tokens[block], 1)
    costs = [len(tokens) * math.log2(num_codes)]
    for a in CONCENTRATIONS:
        probability = (seen + a) / (total + a * num_codes)
        # constriction gives each code at least one part in 2**24.
        probability = probability * (1 - num_codes / 2**24) + 2**-24
        costs.append(-np.log2(probability).sum())
    return int(np.argmin(costs))
