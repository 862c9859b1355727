"""Generated pictures and files that the data tests share."""

import io
import struct
import tarfile
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


def tar(path: Path, files: dict[str, bytes], *, kind: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as writer:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            writer.addfile(member, io.BytesIO(data))
    return path


def parquet(path: Path, cells: list, *, column: str = "image") -> Path:
    """A parquet file with a column of images, each ``{"bytes": ..., "path": ...}``, and labels."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    files = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    labels = list(range(len(cells)))
    table = pyarrow.table({column: pyarrow.array(cells, type=files), "label": labels})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.fixture
def make_tar():
    return tar


@pytest.fixture
def make_parquet():
    return parquet


@pytest.fixture
def files(photos: Path) -> dict[str, bytes]:
    """The twelve pictures by name, in an order that is not the names'."""
    names = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.png"))
    order = np.random.default_rng(0).permutation(len(names))
    return {names[i]: (photos / names[i]).read_bytes() for i in order}
