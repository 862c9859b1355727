"""Read pictures that Pillow cannot represent: NumPy arrays, colours of 16 bits, float TIFFs.

Each kind of file is read by a different library:

    .npy                  NumPy (never unpickles Python objects)
    PNG, 16-bit colours   torchvision (Pillow drops the lower byte)
    TIFF, > 8-bit colours tifffile (Pillow drops the lower byte, or has no such mode)

The functions `read_...` return the stored numbers (H, W, C). For PNG and TIFF, they also return
whether the last channel is alpha. A file whose header states more pixels than Pillow's limit for
decompression bombs is rejected before decoding.
"""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import tifffile
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from latentvae.data.colour_profiles import ICC_TAG
from latentvae.data.pixels import BadPixels, type_top
from latentvae.errors import UserError

NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 0x0112  # the tag of EXIF and TIFF
BITS, PHOTOMETRIC, SAMPLES, PLANES, SAMPLE_FORMAT = 258, 262, 277, 284, 339  # tags of TIFF
# Two kinds of alpha in the tag ExtraSamples. In this tag, 0 means an unspecified channel.
ASSOCIATED, UNASSOCIATED = 1, 2

# Silence tifffile, because latentvae reports a bad file in one line.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_DAMAGED = "a damaged TIFF"
_DEEP_PNG = ("RGB;16", "RGBA;16", "LA;16")  # Pillow's raw modes of PNGs with 16-bit colours
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

File = str | os.PathLike[str] | bytes


@dataclass(frozen=True)
class DeepTiff:
    """The stored numbers of a picture in a TIFF file, with the facts needed to interpret them.

    Attributes:
        values: stored numbers, (H, W, C).
        alpha: whether the last channel is alpha.
        white_is_zero: whether the lowest number means white.
        orientation: EXIF orientation, 1 to 8.
        icc: the embedded colour profile, if there is one.
    """

    values: np.ndarray
    alpha: bool
    white_is_zero: bool
    orientation: int
    icc: bytes | None


def first_bytes(source: File) -> bytes:
    """Return the first 8 bytes of a file."""
    if isinstance(source, bytes):
        return source[:8]
    with open(source, "rb") as file:
        return file.read(8)


def read_npy(source: File, *, channels: int) -> np.ndarray:
    """Return the array in a .npy file as (H, W, C). A file on disk is memory-mapped, not loaded.

    Raises:
        ValueError: the file is damaged, or holds Python objects.
        BadPixels: the array has a wrong shape, or too many pixels.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        shape = npy_shape(file)
        check_shape(shape, channels)
        check_size(shape[1], shape[0])
        if not isinstance(source, bytes):
            array = np.lib.format.open_memmap(source, mode="r")  # rejects Python objects
        else:
            file.seek(0)
            array = np.lib.format.read_array(file, allow_pickle=False)
    return array.reshape(*shape[:2], channels)


def npy_shape(file: IO[bytes]) -> tuple[int, ...]:
    """Return the shape that the header of a .npy file states."""
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise BadPixels(f"the version of a .npy file must be 1.0 or 2.0 (got {version})")
    return _NPY_HEADERS[version](file)[0]


def check_size(width: int, height: int) -> None:
    """Raise BadPixels if a picture has more pixels than Pillow's limit."""
    limit, count = Image.MAX_IMAGE_PIXELS, width * height
    if limit is not None and count > limit:
        raise BadPixels(too_many_pixels(count))


def set_pixel_limit(max_pixels: int | None) -> None:
    """Set the largest number of pixels of an image that this process reads.

    The function sets Pillow's own limit against decompression bombs, which are small files that
    fill the memory.

    Args:
        max_pixels: largest width times height of an image. None means that the limit does not
            change. Pillow's default is 89 million.

    Raises:
        UserError: the limit is below 1.
    """
    if max_pixels is None:
        return
    if max_pixels < 1:
        raise UserError(f"max_pixels must be at least 1 (got {max_pixels})")
    Image.MAX_IMAGE_PIXELS = max_pixels


def too_many_pixels(count: int) -> str:
    """Return a message: why a file of `count` pixels is not read, and what the user can do."""
    limit = Image.MAX_IMAGE_PIXELS or 0
    return (
        f"the image has {count:,} pixels, more than the limit of {limit:,}. If you trust the "
        f"file, set max_pixels to {count} or more"
    )


def check_shape(shape: tuple[int, ...], channels: int) -> None:
    """Raise BadPixels if an array does not have exactly the requested number of channels.

    An array does not say what its channels mean, so no channel is added or dropped.
    """
    if (len(shape) == 3 and shape[2] == channels) or (len(shape) == 2 and channels == 1):
        return
    grey = "(H, W) or " if channels == 1 else ""
    raise BadPixels(f"the array must be {grey}(H, W, {channels}) (got {shape})")


def is_cut_to_8bit(image: Image.Image) -> bool:
    """Return whether Pillow cuts the 16-bit colours of an opened file to 8 bits."""
    if isinstance(image, TiffImageFile):
        # Pillow's raw mode is not enough here: with separate planes it describes only one channel.
        tags = image.tag_v2
        return _bits(image) > 8 and tags.get(SAMPLES, 1) > 1 and tags.get(PHOTOMETRIC) in (0, 1, 2)
    if image.format != "PNG" or not (tiles := getattr(image, "tile", None)):
        return False
    args = tiles[0][3]
    rawmode = args[0] if isinstance(args, tuple) else args
    return isinstance(rawmode, str) and rawmode.startswith(_DEEP_PNG)


def is_misread(image: Image.Image) -> bool:
    """Return whether Pillow silently decodes an opened TIFF to a wrong picture.

    Pillow misreads 16-bit colours in separate planes, and signed 8-bit numbers.
    """
    if not isinstance(image, TiffImageFile):
        return False
    planes = image.tag_v2.get(PLANES) == 2 and image.tag_v2.get(SAMPLES, 1) > 1
    signed = 2 in image.tag_v2.get(SAMPLE_FORMAT, ())
    return planes if _bits(image) > 8 else signed


def _bits(image: TiffImageFile) -> int:
    return max(image.tag_v2.get(BITS, (1,)))


def white_is_zero(image: Image.Image) -> bool:
    """Return whether the lowest number of a grey TIFF is white, as in files of X-ray scanners."""
    return isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0


def read_png16(source: File, image: Image.Image) -> tuple[np.ndarray, bool]:
    """Return the numbers (H, W, C) of a 16-bit PNG, and whether the last channel is alpha.

    Args:
        source: the file.
        image: the same file, already decoded by Pillow, so that the file is known to be undamaged.
    """
    from torchvision.io import decode_png  # imported here, because the import takes seconds

    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    tensor = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))  # (C, H, W), uint16
    values = tensor.permute(1, 2, 0).numpy()
    alpha = values.shape[2] in (2, 4)
    if alpha or (key := image.info.get("transparency")) is None:
        return values, alpha
    return with_key(values, key), True


def with_key(values: np.ndarray, key: int | tuple[int, ...]) -> np.ndarray:
    """Return the values with a 16-bit alpha channel that makes the colour `key` transparent."""
    hidden = (values == np.asarray(key)).all(axis=2, keepdims=True)
    return np.concatenate([values, np.where(hidden, 0, 65535).astype(values.dtype)], axis=2)


@contextmanager
def tiff_page(file: str | os.PathLike[str] | IO[bytes], page: int) -> Iterator[tifffile.TiffPage]:
    """Yield a page of a TIFF. Errors inside the context get an understandable message."""
    try:
        with tifffile.TiffFile(file) as tiff:
            yield tiff.pages[page] if page else tiff.pages.first  # pyright: ignore[reportReturnType]
    except Exception as error:
        # tifffile reports a missing index or key as "0" or "'ImageWidth'".
        lost = isinstance(error, IndexError | KeyError)
        if lost or not any(letter.isalpha() for letter in str(error)):
            raise BadPixels(_DAMAGED) from error
        raise


def read_tiff(source: File, *, page: int = 0) -> DeepTiff:
    """Return one page of a TIFF.

    Colours that were multiplied by alpha are divided by alpha. An extra channel that is not marked
    as alpha, such as infrared, is left out.

    Raises:
        ValueError: the file is damaged, needs `imagecodecs` to be decompressed, is no picture, or
            has too many pixels.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with tiff_page(file, page) as found:
        samples, extra = found.samplesperpixel, _extra_channel(found)

        # errors for pages that are no pictures
        if not found.axes:
            raise BadPixels(_DAMAGED)
        if found.photometric not in (0, 1, 2) or found.axes not in ("YX", "YXS", "SYX"):
            raise BadPixels(
                "a TIFF must be grey or RGB with axes YX, YXS or SYX "
                f"(got {found.photometric!s} and {found.axes})"
            )
        if samples > 4:
            raise BadPixels(f"a TIFF must have 1 to 4 channels (got {samples})")
        if samples == 4 and found.photometric != 2 and extra == 0:
            raise BadPixels("a TIFF of 4 channels must be RGB or have an alpha channel")
        check_size(found.imagewidth, found.imagelength)

        # stored numbers
        values = found.asarray()
        if values.ndim != len(found.axes):  # tifffile returned no pixels
            raise BadPixels(_DAMAGED)
        photometric, turn = found.tags.get(PHOTOMETRIC), found.tags.get(ORIENTATION)
        icc = found.tags.get(ICC_TAG)

    # to (H, W, C)
    if found.axes == "YX":
        values = values[..., None]
    elif found.axes == "SYX":
        values = np.moveaxis(values, 0, 2)
    if extra == 0:
        values = values[..., :-1]
    return DeepTiff(
        values=_unassociated(values) if extra == ASSOCIATED else values,
        alpha=extra in (ASSOCIATED, UNASSOCIATED),
        white_is_zero=photometric is not None and photometric.value == 0,
        orientation=1 if turn is None else int(turn.value),
        icc=None if icc is None else bytes(icc.value),
    )


def _extra_channel(page: tifffile.TiffPage) -> int | None:
    """Return the kind of a grey or RGB picture's extra channel, or None if there is none.

    The kind is `ASSOCIATED` or `UNASSOCIATED` for alpha, and 0 for any other channel.
    """
    if page.samplesperpixel not in (2, 4):
        return None
    kind = int(page.extrasamples[-1]) if page.extrasamples else 0
    return kind if kind in (ASSOCIATED, UNASSOCIATED) else 0


def _unassociated(values: np.ndarray) -> np.ndarray:
    """Divide the colours of stored numbers by their alpha, and return colours and alpha."""
    alpha = values[..., -1:] / type_top(values.dtype)
    colour = np.divide(
        values[..., :-1], alpha, out=np.zeros(values[..., :-1].shape), where=alpha > 0
    )
    if values.dtype.kind != "f":
        colour = np.rint(colour).clip(0, np.iinfo(values.dtype).max)
    return np.concatenate([colour.astype(values.dtype), values[..., -1:]], axis=2)


def upright(orientation: int) -> Image.Transpose | None:
    """Return the transposition that undoes an EXIF orientation, or None if no change is needed."""
    return _UPRIGHT.get(orientation)
