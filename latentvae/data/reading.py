"""Read any image file to a picture. A file that cannot be read raises `UnreadableImage`.

Each kind of file is treated as follows.

- EXIF (or XMP) orientation is applied. For an animation, the first picture is read. For a TIFF, the
  requested page is read.
- Transparency (RGBA, LA, palette or colour key) is composited over white, unless four channels are
  requested.
- A picture with an embedded colour profile is converted to sRGB (``colour_profiles.py``), unless
  profiles are ignored.
- CMYK without a profile is converted by a simple formula: red is (1 - C)(1 - K), and so on. The
  numbers of CMYK JPEGs count as inverted, because Adobe writes them so.
- A grey TIFF of 8 bits or more is inverted if its lowest number means white.
- A ``.npy`` file contains (H, W) for one channel, or (H, W, C) with exactly the requested channels.

Without a ``PixelFormat`` the picture is 8-bit RGB, for display and comparison with codecs.

- 16-bit grey, and integer grey within 0..65535, is divided by 257 (never clipped at 255).
- Float grey is read as 0..1 if no value exceeds 1, else as 0..255.

With a ``PixelFormat``, as in training, the picture has the channels and the range of this format.
Files with more than 8 bits per channel keep their depth (``DeepImage``). An 8-bit RGB file gives
the same picture with the default ``PixelFormat`` and without a ``PixelFormat``.

Pillow decodes only the formats in ``formats.py``: no PostScript, no metafiles. ``deep_files.py``
reads pictures that Pillow cannot represent. Some damage cannot be detected, because the file can
still be decoded. Examples are flipped bits in a JPEG, and a JPEG or PNG that lacks pixels but has a
valid end marker. The missing part of such a picture is grey or black.
"""

import io
import os
import re
import stat
import warnings
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from latentvae.data import deep_files
from latentvae.data.colour_profiles import in_srgb
from latentvae.data.formats import known_formats
from latentvae.data.pixels import EIGHT_BIT, DeepImage, Picture, PixelFormat, deep_image
from latentvae.errors import UserError, first_line

NOT_A_FILE = "it is not a regular file"


class UnreadableImage(UserError):
    """An image file that cannot be decoded.

    Args:
        name: the name of the file in the message.
        reason: why the file cannot be decoded, in a few words.
    """

    # ``reason`` has a default, because DataLoader rebuilds a worker's exception from its traceback.
    def __init__(self, name: str | os.PathLike[str], reason: str = "") -> None:
        super().__init__(f"cannot read image '{name}': {reason}" if reason else str(name))
        self.name = os.fspath(name) if reason else str(self)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.reason)


@overload
def read_image(
    source: deep_files.File, *, at_least: int | None = None, pixels: None = None, page: int = 0
) -> Image.Image: ...


@overload
def read_image(
    source: deep_files.File,
    *,
    at_least: int | None = None,
    pixels: PixelFormat | None,
    page: int = 0,
) -> Picture: ...


def read_image(
    source: deep_files.File,
    *,
    at_least: int | None = None,
    pixels: PixelFormat | None = None,
    page: int = 0,
) -> Picture:
    """Return the upright image. Without ``pixels`` the image is 8-bit RGB without transparency.

    Args:
        source: a path, or the bytes of a file.
        at_least: smallest allowed length of a decoded JPEG's shorter side, in pixels. If the
            shorter side stays long enough, a JPEG is decoded at 1/2, 1/4 or 1/8 of its height and
            width, which is much faster than decoding at full size. None decodes at full size.
        pixels: channels and range of the picture. With ``keep_depth``, pictures of more than 8 bits
            per channel, pictures that Pillow cannot read (such as ``.npy`` files), and all pictures
            with a stated ``value_range`` are returned as a ``DeepImage``. Other pictures are
            returned as a Pillow image of mode "L", "RGB" or "RGBA".
        page: the page of a TIFF, from 0.

    Raises:
        UnreadableImage: the file cannot be read, for any reason.
    """
    name = "<bytes>" if isinstance(source, bytes) else os.fspath(source)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about metadata that we do not use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if pixels is not None:
                deep_files.set_pixel_limit(pixels.max_pixels)  # each worker has its own limit
            if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
                raise UnreadableImage(name, NOT_A_FILE)  # opening a pipe would hang
            return _decode(source, at_least, pixels or EIGHT_BIT, page)
    except UnreadableImage as error:
        raise UnreadableImage(name, error.reason) from None
    # Catch any type: on damaged files Pillow's plugins raise OSError, SyntaxError, ValueError or
    # EOFError. Libraries raise struct.error, KeyError, DecompressionBombError (a plain Exception)
    # and more.
    except Exception as error:
        raise UnreadableImage(name, _reason(error, source)) from error


def _decode(
    source: deep_files.File, at_least: int | None, pixels: PixelFormat, page: int
) -> Picture:
    # files that Pillow reads
    try:
        with _open(source) as image:
            if page:
                image.seek(page)
            if not deep_files.is_misread(image):
                if pixels.keep_depth and deep_files.is_cut_to_8bit(image):
                    return _deep_colours(source, image, pixels, page)
                return in_format(_loaded(image, at_least), pixels)
            deep = _deep_tiff(source, pixels, page)

    # files that Pillow does not know
    except UnidentifiedImageError:
        if (unknown := _unknown_to_pillow(source, pixels, page)) is None:
            raise
        deep = unknown
    return deep if pixels.keep_depth else deep.to_8bit()


def in_format(image: Image.Image, pixels: PixelFormat) -> Picture:
    """Return a decoded image of any mode with the channels and the range of ``pixels``.

    Raises:
        BadPixels: the numbers do not form a picture, or their range is unknown.
    """
    icc = None if pixels.ignore_icc else image.info.get("icc_profile")
    if not pixels.keep_depth:
        return to_rgb(image, icc=icc)
    if pixels.value_range is not None or image.mode == "F" or image.mode.startswith("I"):
        return _with_range(image, pixels, icc=icc)  # the range is for the stored numbers
    return _to_channels(in_srgb(image, icc), pixels.channels)


def _open(source: deep_files.File) -> Image.Image:
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    return Image.open(file, formats=known_formats())


def _loaded(image: Image.Image, at_least: int | None) -> Image.Image:
    if at_least is not None:
        image.draft("RGB", (at_least, at_least))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if min(image.size) < 1:
        raise UnreadableImage("", "it has no pixels")
    return image


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits and 1, 3 or 4 channels.

    Grey is the luma of RGB, so grey pictures do not change.
    """
    if channels == 4:
        opaque = not image.has_transparency_data
        return (to_rgb(image) if opaque else image).convert("RGBA")
    rgb = to_rgb(image)
    return rgb if channels == 3 else rgb.convert("L")


def _with_range(image: Image.Image, pixels: PixelFormat, *, icc: bytes | None) -> DeepImage:
    """Convert a loaded image to a `DeepImage`. The image is grey, or has colours of 8 bits."""
    negative = deep_files.white_is_zero(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)[..., None]
        key = image.info.get("transparency")
        if key is None:
            return deep_image(values, pixels, alpha=False, white_is_zero=negative, icc=icc)
        return deep_image(deep_files.with_key(values, key), pixels, alpha=True, icc=icc)
    alpha = image.has_transparency_data
    if image.mode in ("1", "L") and not alpha:
        values = np.asarray(image.convert("L"))[..., None]
        if negative:  # Pillow has inverted the numbers, but the range is for stored numbers
            values = 255 - values
    else:
        values = np.asarray(_to_channels(image, 4 if alpha else 3))
    return deep_image(values, pixels, alpha=alpha, white_is_zero=negative, icc=icc)


def _deep_colours(
    source: deep_files.File, image: Image.Image, pixels: PixelFormat, page: int
) -> DeepImage:
    if image.format == "TIFF":
        return _deep_tiff(source, pixels, page)
    image.load()  # Pillow detects damage, torchvision does not
    values, alpha = deep_files.read_png16(source, image)
    turn = deep_files.upright(image.getexif().get(deep_files.ORIENTATION, 1))
    deep = deep_image(values, pixels, alpha=alpha, icc=image.info.get("icc_profile"))
    return deep if turn is None else deep.transpose(turn)


def _deep_tiff(source: deep_files.File, pixels: PixelFormat, page: int) -> DeepImage:
    tiff = deep_files.read_tiff(source, page=page)
    deep = deep_image(
        tiff.values, pixels, alpha=tiff.alpha, white_is_zero=tiff.white_is_zero, icc=tiff.icc
    )
    turn = deep_files.upright(tiff.orientation)
    return deep if turn is None else deep.transpose(turn)


def _unknown_to_pillow(source: deep_files.File, pixels: PixelFormat, page: int) -> DeepImage | None:
    start = deep_files.first_bytes(source)
    if start.startswith(deep_files.NPY_MAGIC):
        values = deep_files.read_npy(source, channels=pixels.channels)
        return deep_image(values, pixels, alpha=pixels.channels == 4)
    return _deep_tiff(source, pixels, page) if start.startswith(deep_files.TIFF_MAGICS) else None


def to_rgb(image: Image.Image, *, icc: bytes | None = None) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Transparency is composited over white, and 16-bit numbers are scaled to 8 bits.

    Args:
        image: a loaded image.
        icc: the image's colour profile. With None, no profile is applied.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8bit(image)
    image = in_srgb(image, icc)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    # convert() would copy the image, and allocating memory can take as long as decoding.
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_to_8bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise UnreadableImage("", "some of the file's float values are not finite")
    if image.mode != "F" and (low < 0 or high > 65535):
        raise UnreadableImage("", "some of the file's integers lie outside 0..65535")
    scale = 1 / 257 if image.mode != "F" else 255.0 if high <= 1 else 1.0
    levels = np.rint(np.clip(values * scale, 0, 255)).astype(np.uint8)
    grey = Image.fromarray(255 - levels if deep_files.white_is_zero(image) else levels)
    if (key := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _reason(error: Exception, source: deep_files.File) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        return "not an image of a known format" if size else "the file is empty"
    return reason_of(error)


def _num_pixels(error: Exception) -> int | None:
    """Return the number of pixels of a file that Pillow rejects as a decompression bomb.

    Return None for any other error.
    """
    if not isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return None
    found = re.search(r"\((\d+) pixels\)", str(error))
    return int(found[1]) if found else None


def reason_of(error: Exception) -> str:
    """Return the message of an exception as one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if (count := _num_pixels(error)) is not None:
        return deep_files.too_many_pixels(count)
    return first_line(error)
