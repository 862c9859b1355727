"""The token codec against entropies and the uniform code."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from latentvae.coding.token_codec import (
    decode_levels,
    decode_tokens,
    encode_levels,
    encode_tokens,
)
from latentvae.errors import UserError

WRITTEN = "4c565401006ede27048004060408de0280009c0e4c502d6d6ebd2ac6b551"  # 4 x 8 tokens, K = 512
HEADER = 32  # bytes, with the range coder's last words


@pytest.fixture
def tokens() -> np.ndarray:
    """(16, 24), skewed: code k with probability about 2^-k."""
    return np.random.default_rng(0).geometric(0.5, (16, 24)) - 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_codes=st.sampled_from([1, 2, 3, 100, 2**14]))
def test_round_trip_is_exact(data: st.DataObject, num_codes: int) -> None:
    shape = array_shapes(min_dims=1, max_dims=3, max_side=9)
    tokens = data.draw(arrays(np.int32, shape, elements=st.integers(0, num_codes - 1)))
    decoded = decode_tokens(encode_tokens(tokens, num_codes=num_codes))
    assert decoded.dtype == np.int64
    assert np.array_equal(decoded, tokens)  # of equal shape too


@pytest.mark.parametrize("num_codes", [1, 16, 512])
def test_levels_share_a_file_and_not_their_counts(num_codes: int) -> None:
    draw = np.random.default_rng(0)
    top = np.full((4, 6), num_codes - 1)
    bottom = draw.integers(0, num_codes, (8, 12))
    content = encode_levels([top, bottom], num_codes=num_codes)
    decoded = decode_levels(content)
    assert [level.shape for level in decoded] == [(4, 6), (8, 12)]
    assert all(np.array_equal(a, b) for a, b in zip(decoded, (top, bottom), strict=True))
    files = [encode_tokens(level, num_codes=num_codes) for level in (top, bottom)]
    assert len(content) < sum(map(len, files)) <= len(content) + HEADER


def test_damaged_levels_are_refused() -> None:
    content = encode_levels([np.zeros((2, 2), int), np.ones((4, 4), int)], num_codes=4)
    for wrong in (content[:-4], content[:20] + b"x" + content[21:], b"LVT" + content[3:], b""):
        with pytest.raises(UserError):
            decode_levels(wrong)
    with pytest.raises(ValueError, match="1 to 8 levels"):
        encode_levels([], num_codes=4)
    with pytest.raises(ValueError, match=r"must be in 0\.\.3 \(got 4\.\.4\)"):
        encode_levels([np.full((2, 2), 4)], num_codes=4)


def test_a_file_of_an_earlier_process_is_read() -> None:
    expected = [
        [1, 0, 0, 0, 2, 3, 1, 1],
        [1, 3, 2, 0, 2, 0, 1, 0],
        [2, 1, 0, 0, 0, 0, 1, 1],
        [1, 0, 8, 5, 1, 1, 1, 0],
    ]
    assert decode_tokens(bytes.fromhex(WRITTEN)).tolist() == expected
    assert encode_tokens(np.array(expected), num_codes=512).hex() == WRITTEN


@pytest.mark.parametrize("num_codes", [1, 2, 512, 2**18])
def test_a_constant_image_costs_almost_nothing(num_codes: int) -> None:
    content = encode_tokens(np.full((32, 32), num_codes - 1), num_codes=num_codes)
    assert len(content) < HEADER


@pytest.mark.parametrize("num_codes", [2, 1000, 2**14, 2**18])
@pytest.mark.parametrize("side", [1, 8, 32])
def test_random_tokens_cost_the_uniform_code(num_codes: int, side: int) -> None:
    tokens = np.random.default_rng(0).integers(0, num_codes, (side, side))
    content = encode_tokens(tokens, num_codes=num_codes)
    assert len(content) <= math.log2(num_codes) * side**2 / 8 + HEADER
    assert np.array_equal(decode_tokens(content), tokens)


@pytest.mark.parametrize("num_codes", [64, 4096, 2**18])
def test_skewed_tokens_cost_about_their_entropy(num_codes: int) -> None:
    """Probabilities 2^-1, 2^-2, ...: 2 bits. Each new code costs about log2 K once."""
    tokens = np.minimum(np.random.default_rng(1).geometric(0.5, (128, 128)) - 1, num_codes - 1)
    tokens = num_codes - 1 - tokens
    content = encode_tokens(tokens, num_codes=num_codes)
    learning = 16 * (math.log2(num_codes) + math.log2(tokens.size))
    assert 2.0 * 0.98 <= 8 * len(content) / tokens.size <= 2.0 * 1.03 + learning / tokens.size
    assert np.array_equal(decode_tokens(content), tokens)


def test_uniform_on_few_of_many_codes_is_learnt() -> None:
    tokens = np.random.default_rng(0).integers(0, 16, (64, 64)) * 1000
    bits = 8 * len(encode_tokens(tokens, num_codes=2**14)) / tokens.size
    assert 4.0 < bits < 4.2


@pytest.mark.parametrize("position", [9, 20, -1])
def test_damage_is_noticed(tokens: np.ndarray, position: int) -> None:
    content = encode_tokens(tokens, num_codes=512)
    flipped = bytearray(content)
    flipped[position] ^= 1
    for wrong in (bytes(flipped), content[:position], content + b"\0\0\0\0"):
        with pytest.raises(UserError, match="damaged"):
            decode_tokens(wrong)


def test_other_files_are_refused(tokens: np.ndarray) -> None:
    content = encode_tokens(tokens, num_codes=512)
    for wrong in (b"", b"GIF89a", b"LVZ\x01" + content[4:]):
        with pytest.raises(UserError, match="must start with"):
            decode_tokens(wrong)
    with pytest.raises(UserError, match="version 1"):
        decode_tokens(b"LVT\x07" + content[4:])


@settings(max_examples=200, deadline=None)
@given(start=st.integers(0, 40), values=st.binary(min_size=1, max_size=6))
def test_a_forged_file_is_decoded_or_refused(start: int, values: bytes) -> None:
    """With the right checksum: any header and any payload, but never a crash."""
    body = bytearray(encode_tokens(np.arange(30) % 7, num_codes=20)[8:])
    body[start : start + len(values)] = values
    try:
        decode_tokens(b"LVT\x01" + zlib.crc32(body).to_bytes(4, "little") + body)
    except UserError as error:
        assert "damaged" in str(error)


def test_wrong_tokens_are_refused(tokens: np.ndarray) -> None:
    with pytest.raises(UserError, match="got 2097152"):
        encode_tokens(tokens, num_codes=2**21)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        encode_tokens(np.array([0, 4]), num_codes=4)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        encode_tokens(np.array([-1, 2]), num_codes=4)
    for wrong in (np.array([0.5]), np.zeros(0, int), np.zeros((1, 1, 1, 1), int)):
        with pytest.raises(ValueError, match="tokens must be integers"):
            encode_tokens(wrong, num_codes=4)
