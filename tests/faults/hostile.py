"""Files that a folder of images from the web may hold: bad ones with the reason to be told, odd
ones that are images all the same, and what is left out."""

import io
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.conftest import picture, png


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _with_chunk(content: bytes, name: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    chunk = struct.pack(">I", len(data)) + name + data
    return content[:33] + chunk + struct.pack(">I", zlib.crc32(name + data)) + content[33:]


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Content by name, and what the reason must say (a regular expression)."""
    image = picture(64, 48)
    whole = encoded(image, "PNG")
    wrong_crc = bytearray(whole)
    wrong_crc[whole.index(b"IDAT") + 6] ^= 0xFF
    text = b"note\0\0" + zlib.compress(bytes(5_000_000))
    bomb = png((60_000, 60_000), 8, 2, b"\0\0\0\0")

    # the files, each with the reason for its refusal
    return {
        "bomb.png": (bomb, "3,600,000,000 pixels"),
        "bomb-in-text.png": (_with_chunk(whole, b"zTXt", text), "too large"),
        "crc.png": (bytes(wrong_crc), "bad|broken|CRC"),
        "cut.gif": (encoded(image, "GIF")[:-900], "truncated"),
        "cut.jpg": (encoded(image, "JPEG")[:900], "truncated"),
        "cut.png": (whole[: len(whole) // 2], "truncated"),
        "cut.webp": (encoded(image, "WEBP")[:-80], "."),
        "empty.jpg": (b"", "the file is empty"),
        "flat.png": (png((0, 8), 8, 2, b""), "."),
        "html.jpg": (b"<html><body>404 Not Found</body></html>", "not an image"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "tall.png": (whole[:20] + struct.pack(">I", 480) + whole[24:], "."),
        "text\nof two lines.jpg": (b"hello", "not an image"),
        "zeros.png": (bytes(1000), "not an image"),
        "\udcff.jpg": (b"<html>", "not an image"),
    }


def odd_files() -> dict[str, bytes]:
    """Images all the same."""
    image = picture(40, 40)
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.full((40, 40), 40_000, dtype=np.uint16))
    palette = (b"PLTE", bytes([255, 0, 0, 0, 255, 0])), (b"tRNS", b"\x00")
    frames: dict[str, Any] = {"save_all": True, "append_images": [picture(40, 40, seed=1)]}
    plain = encoded(image, "PNG")

    # odd sizes and formats, then odd names
    return {
        "1x1.png": encoded(picture(1, 1), "PNG"),
        "1x10000.png": encoded(picture(1, 10_000), "PNG"),
        "UPPER.JPG": encoded(image, "JPEG"),
        "animated.gif": encoded(image, "GIF", **frames),
        "animated.png": encoded(image, "PNG", **frames),
        "animated.webp": encoded(image, "WEBP", **frames),
        "bilevel.png": encoded(image.convert("1"), "PNG"),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "deep.png": encoded(deep, "PNG"),
        "grey-alpha.png": encoded(image.convert("LA"), "PNG"),
        "palette.png": png((2, 1), 8, 3, b"\0\0\1", *palette),
        "turned.jpg": encoded(image, "JPEG", exif=turned),
        "wrong-suffix.jpg": plain,
        "=1+1.png": plain,
        "-rf.png": plain,
        " space.png": plain,
        "two\nlines.png": plain,
        "\x1b[31mred.png": plain,
        "\udcfe.png": plain,
        "\U0001f642.png": plain,
        "n" * 240 + ".png": plain,
        "sub.jpg/inside.png": plain,  # a folder with the name of an image
    }


LEFT_OUT = (".hidden.png", "._UPPER.JPG", ".hidden/x.png", "Thumbs.db", "notes.txt", "desktop.ini")


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def odd_entries(root: Path) -> dict[str, str]:
    """Put into a folder what is no plain file; gives the names to be told, and the reasons."""
    os.mkfifo(root / "pipe.jpg")
    (root / "to-pipe.jpg").symlink_to("pipe.jpg")
    (root / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "itself.jpg").symlink_to("itself.jpg")
    (root / "loop").symlink_to(".")
    (root / "empty-folder.jpg").mkdir()
    told = {
        "pipe.jpg": "regular file",
        "to-pipe.jpg": "regular file",
        "gone.jpg": "No such file",
        "itself.jpg": "symbolic links",
    }
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(root / "socket.jpg"))  # a long path would not fit
        told["socket.jpg"] = "regular file"
    except OSError:
        pass
    return told
