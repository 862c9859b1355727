"""Pack coded latents and tokens into a file: header numbers, then the output of a range coder.

    file = magic and version (4 bytes) | crc32 (4) | count of numbers (1)
           | header numbers (as varints: 7 bits per byte) | 32-bit words of the range coder

The range coder comes from the package constriction (Bamler 2022, https://arxiv.org/abs/2201.01741).
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]  # compiled
from numpy.typing import NDArray

from latentvae.errors import UserError

Integers = NDArray[np.int64]


def pack(magic: bytes, numbers: Sequence[int], coder: Any) -> bytes:
    """Return a file's bytes: header numbers, then the 32-bit words of a range coder.

    Args:
        magic: the first 4 bytes of the file. The 4th byte is the version of the format.
        numbers: the header numbers: at most 255 whole numbers, each from 0 to 2**35 - 1.
        coder: the range encoder.
    """
    head = bytes([len(numbers)]) + b"".join(map(_varint, numbers))
    body = head + coder.get_compressed().astype("<u4").tobytes()
    return magic + zlib.crc32(body).to_bytes(4, "little") + body


def unpack(magic: bytes, content: bytes) -> tuple[list[int], Any]:
    """Return the header numbers and a range decoder from bytes that `pack` returned.

    Raises:
        UserError: the bytes are another kind of file, have another format version, or are damaged.
    """
    if content[:3] != magic[:3]:
        raise UserError(f"the file must start with {magic[:3]!r} (got {content[:3]!r}).")
    if content[3:4] != magic[3:]:
        raise UserError(
            f"only version {magic[3]} of the format can be read (got {list(content[3:4])})."
        )
    body = content[8:]
    require(len(body) > 0 and zlib.crc32(body).to_bytes(4, "little") == content[4:8])

    # header, then the coder's words
    numbers, position = [], 1
    for _ in range(body[0]):
        number, position = _read_varint(body, position)
        numbers.append(number)
    require((len(body) - position) % 4 == 0)
    words = np.frombuffer(body, "<u4", offset=position).astype(np.uint32)
    return numbers, stream.queue.RangeDecoder(words)


def _varint(number: int) -> bytes:
    """Return a number as bytes that hold seven bits each, lowest bits first.

    The top bit of a byte is 1 if more bytes follow.
    """
    assert number >= 0
    groups = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def _read_varint(body: bytes, start: int) -> tuple[int, int]:
    """Return the number (below 2**35) at position `start`, and the position after this number."""
    number = 0
    for i, byte in enumerate(body[start : start + 5]):
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, start + i + 1
    raise damaged()


def decode_symbols(coder: Any, model: Any, count: int) -> Integers:
    """Return the next `count` symbols of `coder`. Raise UserError if the file is damaged."""
    try:
        return coder.decode(model, count).astype(np.int64)
    except AssertionError as error:  # constriction raises AssertionError for impossible words
        raise damaged() from error


def require(holds: bool) -> None:
    if not holds:
        raise damaged()


def damaged() -> UserError:
    """Return the error to raise if the bytes of a file are damaged."""
    return UserError("the file is damaged or incomplete. Encode it again.")
