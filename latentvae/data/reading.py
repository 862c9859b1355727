"""One way from an image file to 8-bit RGB, and one exception for every file that cannot be read.

What becomes of each kind of file:

- EXIF (or XMP) orientation is applied; of an animation the first frame is taken.
- Transparency (RGBA, LA, palette or colour key) is laid over white.
- 16-bit grey, and integer grey within 0..65535, is divided by 257 (never clipped at 255).
- Float grey is read as 0..1 if no value exceeds 1, else as 0..255.
- CMYK is converted without a profile; JPEGs are taken as inverted, as Adobe writes them.

Files are decoded by Pillow, only as the formats in ``FORMATS``: no PostScript, no metafiles.
Damage that still decodes cannot be told from a good file: flipped bits in a JPEG, or a JPEG or PNG
with a well-formed end that comes too early (the rest is then grey or black).
"""

import functools
import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from latentvae.errors import UserError

NOT_A_FILE = "it is not a regular file"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")


class UnreadableImage(UserError):
    """An image file that cannot be decoded.

    Args:
        name: the file, as the message shall name it.
        reason: why, in a few words.
    """

    # ``reason`` has a default: DataLoader rebuilds a worker's exception from its traceback alone.
    def __init__(self, name: str | os.PathLike[str], reason: str = "") -> None:
        super().__init__(f"cannot read image '{name}': {reason}" if reason else str(name))
        self.name = os.fspath(name) if reason else str(self)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.reason)


def read_image(
    source: str | os.PathLike[str] | bytes, *, at_least: int | None = None
) -> Image.Image:
    """Return the image as 8-bit RGB, upright and without transparency.

    Args:
        source: a path, or the bytes of a file.
        at_least: allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size (much faster) as long
            as its shorter side keeps this many pixels; ``None`` decodes at full size.

    Raises:
        UnreadableImage: whatever is wrong with the file.
    """
    name = "<bytes>" if isinstance(source, bytes) else os.fspath(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on metadata we do not use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
                raise UnreadableImage(name, NOT_A_FILE)  # opening a pipe would wait for a writer
            return _decode(io.BytesIO(source) if isinstance(source, bytes) else source, at_least)
    except UnreadableImage as error:
        raise UnreadableImage(name, error.reason) from None
    # Not a list of types: on damaged files Pillow's plugins raise OSError, SyntaxError, ValueError,
    # EOFError, struct.error, KeyError, DecompressionBombError (a plain Exception) and more.
    except Exception as error:
        raise UnreadableImage(name, _reason(error, source)) from error


def _decode(file: str | os.PathLike[str] | io.BytesIO, at_least: int | None) -> Image.Image:
    with Image.open(file, formats=_formats()) as image:
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if min(image.size) < 1:
            raise UnreadableImage("", "it has no pixels")
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode; transparency is composited over white, 16 bits scaled."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8bit(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _grey_to_8bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise UnreadableImage("", "its float values are not all finite")
    if image.mode != "F" and (low < 0 or high > 65535):
        raise UnreadableImage("", "its integer values lie outside 0..65535")
    scale = 1 / 257 if image.mode != "F" else 255.0 if high <= 1 else 1.0
    grey = Image.fromarray(np.rint(np.clip(values * scale, 0, 255)).astype(np.uint8))
    if (key := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reason(error: Exception, source: str | os.PathLike[str] | bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        return "not an image of a known format" if size else "the file is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
