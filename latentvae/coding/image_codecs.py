"""Encode images with Pillow's codecs, to compare models with JPEG, WebP and AVIF.

The bit rate of an image counts all bytes of the file, including the header.
"""

import io
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image, features


@dataclass(frozen=True)
class Codec:
    """An image codec with fixed options, and the qualities at which it is measured.

    Args:
        format: Pillow's name of the file format.
        qualities: Pillow's `quality` (1 to 100) for each point of the rate curve, in rising order.
        options: all other options of the encoder.
        max_side: largest width or height that the format can hold, in pixels.
    """

    format: str
    qualities: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    max_side: int = 65500

    def encode(self, image: Image.Image, *, quality: int) -> bytes:
        """Encode an image and return the complete file, headers included."""
        buffer = io.BytesIO()
        image.save(buffer, format=self.format, quality=quality, **self.options)
        return buffer.getvalue()

    def decode(self, content: bytes) -> Image.Image:
        with Image.open(io.BytesIO(content), formats=[self.format]) as image:
            return image.convert("RGB")

    def describe(self) -> dict[str, Any]:
        """Return facts about the codec for a report: encoder library, options and qualities."""
        library = _LIBRARIES[self.format]
        return {
            "library": f"{library} {features.version(library)}",
            "options": dict(self.options),
            "qualities": list(self.qualities),
        }


_LIBRARIES = {"JPEG": "jpg", "WEBP": "webp", "AVIF": "avif"}  # Pillow's names of the libraries
_QUALITIES = (1, 5, 10, 20, 35, 50, 70, 85, 95)

CODECS: dict[str, Codec] = {
    # Published rate curves of JPEG use the Huffman tables of the standard. With `optimize`, files
    # would be smaller by up to a third, and not comparable.
    "jpeg": Codec("JPEG", _QUALITIES, {"optimize": False, "subsampling": "4:2:0"}),
    "webp": Codec("WEBP", _QUALITIES, {"method": 4}, max_side=16383),
    "avif": Codec("AVIF", _QUALITIES, {"speed": 6, "subsampling": "4:2:0"}),
}


def available_codecs(qualities: tuple[int, ...] = _QUALITIES) -> dict[str, Codec]:
    """Return the codecs that this build of Pillow can write, each with the given `qualities`."""
    return {
        name: replace(codec, qualities=qualities)
        for name, codec in CODECS.items()
        if features.check(_LIBRARIES[codec.format])
    }


def bits_per_pixel(content: bytes, image: Image.Image) -> float:
    return 8 * len(content) / (image.width * image.height)


def encode_at_rate(
    codec: Codec, image: Image.Image, *, bpp: float, files: dict[int, bytes] | None = None
) -> tuple[bytes, int]:
    """Return the file of the lowest quality that reaches `bpp` bits per pixel, and this quality.

    If no quality gives `bpp` bits per pixel or more, the quality is 100. The search assumes that
    the number of bits rises with quality.

    Args:
        codec: the codec.
        image: the image.
        bpp: bits per pixel.
        files: files of this image that are already encoded, by quality. The search uses the encoded
            files, and adds each new file that it encodes to `files`.
    """
    files = {} if files is None else files
    target = bpp * image.width * image.height / 8  # bytes

    def file(quality: int) -> bytes:
        if quality not in files:
            files[quality] = codec.encode(image, quality=quality)
        return files[quality]

    def enough(quality: int) -> bool:
        return bits_per_pixel(file(quality), image) >= bpp

    # the encoded qualities just below and just above `bpp`
    low = max((quality for quality in files if not enough(quality)), default=0)
    high = min((quality for quality in files if quality > low), default=101)

    # Move `low` and `high` until they differ by 1. The logarithm of the rate is nearly linear in
    # the quality, so interpolation needs fewer files than halving the interval. Every third step
    # halves the interval, in case the logarithm is far from linear.
    for step in itertools.count(1):
        if high - low <= 1:
            break
        halve = low not in files or high not in files or step % 3 == 0
        share = 0.5 if halve else _share(*(len(files[quality]) for quality in (low, high)), target)
        quality = min(max(low + round(share * (high - low)), low + 1), high - 1)
        low, high = (low, quality) if enough(quality) else (quality, high)
    quality = min(high, 100)
    return file(quality), quality


def _share(low: int, high: int, target: float) -> float:
    """Return the position of `target` between two file sizes on a logarithmic scale.

    The position is between 0 (at size `low`) and 1 (at size `high`). If `target` is not between
    `low` and `high`, the position is 0.5.
    """
    return math.log(target / low) / math.log(high / low) if low < target < high else 0.5
