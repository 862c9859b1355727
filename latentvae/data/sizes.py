"""Read the size of an image from its file's header, without decoding the image."""

import io
import os
import stat
import warnings
from typing import IO

from PIL import Image, UnidentifiedImageError

from latentvae.data import deep_files
from latentvae.data.formats import known_formats
from latentvae.data.reading import NOT_A_FILE, UnreadableImage, reason_of

_SIDEWAYS = range(5, 9)  # EXIF orientations that swap the sides


def read_size(source: deep_files.File | IO[bytes], *, name: str, page: int = 0) -> tuple[int, int]:
    """Return width and height of the upright image.

    Args:
        source: a path, the bytes of a file, or an open file.
        name: the name of the file in an error.
        page: the page of a TIFF, from 0.

    Raises:
        UnreadableImage: the file cannot be opened, its header is damaged, or its format is unknown.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")

            # by the kind of source
            if isinstance(source, bytes):
                return _size(io.BytesIO(source), page)
            if not isinstance(source, str | os.PathLike):
                return _size(source, page)
            if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe would hang
                raise UnreadableImage(name, NOT_A_FILE)
            with open(source, "rb") as file:
                return _size(file, page)

    # report what is wrong
    except UnreadableImage:
        raise
    except Exception as error:  # libraries raise errors of any type
        reason = "not an image of a known format"
        if not isinstance(error, UnidentifiedImageError):
            reason = reason_of(error)
        raise UnreadableImage(name, reason) from error


def _size(file: IO[bytes], page: int) -> tuple[int, int]:
    start = file.read(8)
    file.seek(0)
    if start.startswith(deep_files.NPY_MAGIC):
        shape = deep_files.npy_shape(file)
        return shape[1], shape[0]
    try:
        with Image.open(file, formats=known_formats()) as image:
            if page:
                image.seek(page)
            sideways = _orientation(image) in _SIDEWAYS
            return (image.height, image.width) if sideways else image.size
    except UnidentifiedImageError:
        if not start.startswith(deep_files.TIFF_MAGICS):
            raise
    file.seek(0)
    with deep_files.tiff_page(file, page) as found:
        tag = found.tags.get(deep_files.ORIENTATION)
        sideways = tag is not None and tag.value in _SIDEWAYS
        width, height = found.imagewidth, found.imagelength
        return (height, width) if sideways else (width, height)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, or 1 if `image.size` is upright already.

    For a TIFF, Pillow already returns the upright size. A PNG with EXIF data after its pixels
    counts as upright, because finding this EXIF data would mean decoding the complete file.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return image.getexif().get(deep_files.ORIENTATION, 1)
