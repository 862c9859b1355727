"""Write a tokenizer's indices to a file by adaptive arithmetic coding, without a trained model.

    content = encode_tokens(indices, num_codes=16384)  # int (h, w)
    indices = decode_tokens(content)                   # int64 (h, w), from the bytes alone
    content = encode_levels([top, bottom], num_codes=512)  # several codebooks in one file
    top, bottom = decode_levels(content)

The probability model ignores the positions of tokens (order 0). Encoder and decoder both count the
codes seen so far. If a code occurred c times in the n tokens so far, its probability is
(c + a) / (n + a K), for K codes and a number a. The probability of a code is the posterior mean
under a symmetric Dirichlet prior (Krichevsky and Trofimov 1981 for a = 1/2,
https://doi.org/10.1109/TIT.1981.1056331). The encoder tries each value of a from a short list, and
also a uniform distribution, and takes the choice with the fewest bits for this image. A uniform
distribution may be best for few tokens and many codes. Counts are updated after each block of
tokens. The length of a block is an eighth of the number of tokens before the block. So the time to
compute probabilities for all n tokens of an image grows as K log n, not as K n.

`K` codes, `n` tokens.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]  # compiled
from numpy.typing import NDArray

from latentvae.coding.bitstream import Integers, damaged, decode_symbols, pack, unpack
from latentvae.errors import UserError

TOKEN_MAGIC, LEVELS_MAGIC = b"LVT\x01", b"LVM\x01"  # the last byte is the format's version
MAX_LEVELS = 8
MAX_CODES = 2**20
MAX_TOKENS = 2**24
# The possible values of the number a, which is added to each count. A file stores the position of
# the value in this list, counted from 1, or 0 for a uniform distribution.
CONCENTRATIONS = tuple(4.0**k for k in range(1, -10, -1))


def encode_tokens(indices: NDArray[np.integer], *, num_codes: int) -> bytes:
    """Return one image's tokens as the bytes of a complete file (header and coded tokens).

    Args:
        indices: integers in 0..num_codes - 1, with 1 to 3 dimensions.
        num_codes: number of codes of the tokenizer, at most 2**20.

    Raises:
        ValueError: the indices have a wrong shape or type, or are out of range.
        UserError: `num_codes` is not 1 to 2**20, or there are more than 2**24 tokens.
    """
    _check_tokens(indices, num_codes)
    tokens = indices.reshape(-1).astype(np.int64)
    choice = _cheapest(tokens, num_codes)
    coder = stream.queue.RangeEncoder()
    _encode(coder, tokens, num_codes, choice)
    return pack(TOKEN_MAGIC, [num_codes, choice, *indices.shape], coder)


def decode_tokens(content: bytes) -> Integers:
    """Return the tokens of a file that `encode_tokens` wrote, as int64 in their original shape.

    Raises:
        UserError: the bytes are damaged, incomplete or another kind of file.
    """
    # header
    numbers, coder = unpack(TOKEN_MAGIC, content)
    if not 3 <= len(numbers) <= 5:
        raise damaged()
    num_codes, choice, *shape = numbers
    count = math.prod(shape)
    _check_header(num_codes, choice, count)
    tokens = _decode(coder, count, num_codes, choice)
    if not coder.maybe_exhausted():
        raise damaged()
    return tokens.reshape(shape)


def encode_levels(levels: Sequence[NDArray[np.integer]], *, num_codes: int) -> bytes:
    """Return one image's maps of tokens, one for each level, as the bytes of a complete file.

    The probabilities of codes are estimated for each map separately.

    Args:
        levels: the indices (h, w) of each level, in 0..num_codes - 1. At most 8 levels.
        num_codes: number of codes of each level, at most 2**20.

    Raises:
        ValueError: there are not 1 to 8 levels, or the indices of a level are wrong.
        UserError: see `encode_tokens`.
    """
    if not 1 <= len(levels) <= MAX_LEVELS or any(level.ndim != 2 for level in levels):
        shapes = [level.shape for level in levels]
        raise ValueError(f"1 to {MAX_LEVELS} levels of shape (h, w) can be encoded (got {shapes}).")
    numbers, coder = [num_codes], stream.queue.RangeEncoder()
    for level in levels:
        _check_tokens(level, num_codes)
        tokens = level.reshape(-1).astype(np.int64)
        choice = _cheapest(tokens, num_codes)
        numbers += [choice, *level.shape]
        _encode(coder, tokens, num_codes, choice)
    return pack(LEVELS_MAGIC, numbers, coder)


def decode_levels(content: bytes) -> list[Integers]:
    """Return the maps of tokens in a file that `encode_levels` wrote, each (h, w), int64.

    Raises:
        UserError: the bytes are damaged, incomplete or another kind of file.
    """
    numbers, coder = unpack(LEVELS_MAGIC, content)
    if len(numbers) % 3 != 1 or not 4 <= len(numbers) <= 1 + 3 * MAX_LEVELS:
        raise damaged()
    num_codes, *rest = numbers
    levels = []
    for choice, height, width in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        _check_header(num_codes, choice, height * width)
        tokens = _decode(coder, height * width, num_codes, choice)
        levels.append(tokens.reshape(height, width))
    if not coder.maybe_exhausted():
        raise damaged()
    return levels


def _encode(coder: Any, tokens: Integers, num_codes: int, choice: int) -> None:
    """Write n tokens, (n,), block by block, with probabilities from the earlier blocks."""
    model = _Model(num_codes, choice)
    for block in _blocks(len(tokens)):
        if num_codes > 1:
            coder.encode(tokens[block].astype(np.int32), model.current())
        model.update(tokens[block])


def _decode(coder: Any, count: int, num_codes: int, choice: int) -> Integers:
    """Read `count` tokens block by block, as `_encode` wrote them."""
    tokens = np.zeros(count, np.int64)
    model = _Model(num_codes, choice)
    for block in _blocks(count):
        if num_codes > 1:
            tokens[block] = decode_symbols(coder, model.current(), block.stop - block.start)
        model.update(tokens[block])
    return tokens


def _check_header(num_codes: int, choice: int, count: int) -> None:
    if not (1 <= num_codes <= MAX_CODES and 1 <= count <= MAX_TOKENS):
        raise damaged()
    if choice > len(CONCENTRATIONS):
        raise damaged()


def _check_tokens(indices: NDArray[np.integer], num_codes: int) -> None:
    if not 1 <= num_codes <= MAX_CODES:
        raise UserError(f"num_codes must be 1 to {MAX_CODES} to be encoded (got {num_codes}).")
    if indices.ndim not in (1, 2, 3) or indices.size == 0 or indices.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be integers of shape (n), (h, w) or (l, h, w) "
            f"(got {indices.dtype} of shape {indices.shape})."
        )
    if indices.size > MAX_TOKENS:
        raise UserError(f"at most {MAX_TOKENS} tokens can be encoded (got {indices.size}).")
    if indices.min() < 0 or indices.max() >= num_codes:
        found = f"{indices.min()}..{indices.max()}"
        raise ValueError(
            f"tokens of {num_codes} codes must be in 0..{num_codes - 1} (got {found})."
        )


class _Model:
    """Counts the codes seen so far, and gives the probabilities of all codes for the next block."""

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
    """Yield blocks of tokens whose length is an eighth of the number of tokens before the block.

    Each block has at least one token.
    """
    start = 0
    while start < count:
        stop = min(count, start + max(1, start // 8))
        yield slice(start, stop)
        start = stop


def _cheapest(tokens: Integers, num_codes: int) -> int:
    """Return the choice of probability model with the fewest bits.

    The choice is the position in `CONCENTRATIONS`, counted from 1, or 0 for a uniform distribution.
    """
    # for each token: how often its code occurred before, and the number of tokens before
    counts = np.zeros(num_codes, np.int64)
    seen, total = np.empty(len(tokens)), np.empty(len(tokens))
    for block in _blocks(len(tokens)):
        seen[block], total[block] = counts[tokens[block]], block.start
        np.add.at(counts, tokens[block], 1)

    # bits of each choice
    costs = [len(tokens) * math.log2(num_codes)]
    for a in CONCENTRATIONS:
        probability = (seen + a) / (total + a * num_codes)
        # constriction gives each code a probability of at least 2**-24.
        probability = probability * (1 - num_codes / 2**24) + 2**-24
        costs.append(-np.log2(probability).sum())
    return int(np.argmin(costs))
