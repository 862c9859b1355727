"""Generated pictures and files that the data tests share."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random colour picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def png(size: tuple[int, int], depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]):
    """A PNG file written by hand: ``kind`` is its colour type, ``rows`` are its filtered rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    extra = b"".join(chunk(*pair) for pair in chunks)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra + body


@pytest.fixture
def make_png():
    return png


@pytest.fixture
def make_picture():
    return picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures of different sizes, in two sub-folders."""
    root = tmp_path / "photos"
    for index in range(12):
        file = root / ("ab"[index % 2]) / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(30 + 3 * index, 50 - 2 * index, seed=index).save(file)
    return root
