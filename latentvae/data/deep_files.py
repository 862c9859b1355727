"""Files that hold more than Pillow's modes do: arrays of NumPy, colours of 16 bits, float TIFFs.

    .npy                  NumPy; never unpickled
    PNG, 16-bit colours   torchvision (Pillow drops the lower byte)
    TIFF, deep colours    tifffile (Pillow drops the lower byte, or knows no such mode)

All give stored numbers (H, W, C) as they are and whether the last channel is alpha.
"""

import io
import os
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image

from latentvae.data.pixels import BadPixels

NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 0x0112  # the tag of EXIF and TIFF

# Rawmodes of colours that Pillow cuts to 8 bits.
_DEEP_RAWMODES = ("RGB;16", "RGBA;16", "LA;16")
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


def first_bytes(source: File) -> bytes:
    if isinstance(source, bytes):
        return source[:8]
    with open(source, "rb") as file:
        return file.read(8)


def read_npy(source: File, *, channels: int) -> np.ndarray:
    """The array in a .npy file as (H, W, C); a file on disk is mapped, not loaded.

    Raises:
        ValueError: it is damaged, or holds Python objects.
        BadPixels: another shape.
    """
    if isinstance(source, bytes):
        array = np.lib.format.read_array(io.BytesIO(source), allow_pickle=False)
    else:
        array = np.lib.format.open_memmap(source, mode="r")  # refuses Python objects
    check_shape(array.shape, channels)
    return array.reshape(*array.shape[:2], channels)


def check_shape(shape: tuple[int, ...], channels: int) -> None:
    """An array does not say what its channels are, so none are made up or left out."""
    if (len(shape) == 3 and shape[2] == channels) or (len(shape) == 2 and channels == 1):
        return
    grey = "(H, W) or " if channels == 1 else ""
    raise BadPixels(f"the array is {shape}; {grey}(H, W, {channels}) is needed")


def is_cut_to_8bit(image: Image.Image) -> bool:
    """Whether an opened file has colours of 16 bits of which Pillow keeps 8."""
    if image.format not in ("PNG", "TIFF") or not (tiles := getattr(image, "tile", None)):
        return False
    args = tiles[0][3]
    rawmode = args[0] if isinstance(args, tuple) else args
    return isinstance(rawmode, str) and rawmode.startswith(_DEEP_RAWMODES)


def read_png16(source: File, image: Image.Image) -> tuple[np.ndarray, bool]:
    """A PNG of 16-bit colours that Pillow has opened and decoded, so that it is not damaged."""
    from torchvision.io import decode_png  # takes seconds, which only those who use it pay

    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    tensor = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))  # (C, H, W), uint16
    values = tensor.permute(1, 2, 0).numpy()
    alpha = values.shape[2] in (2, 4)
    if alpha or (key := image.info.get("transparency")) is None:
        return values, alpha
    return with_key(values, key), True


def with_key(values: np.ndarray, key: int | tuple[int, ...]) -> np.ndarray:
    """With an alpha of 16 bits that hides one colour."""
    hidden = (values == np.asarray(key)).all(axis=2, keepdims=True)
    return np.concatenate([values, np.where(hidden, 0, 65535).astype(values.dtype)], axis=2)


def read_tiff(source: File) -> tuple[np.ndarray, bool, int]:
    """The first page of a TIFF, whether it has alpha, and its orientation.

    Raises:
        ValueError: it is damaged, compressed in a way that needs `imagecodecs`, or no picture.
    """
    with tifffile.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source) as tiff:
        page = tiff.pages.first
        samples = page.samplesperpixel
        if page.photometric not in (0, 1, 2) or page.axes not in ("YX", "YXS", "SYX"):
            raise BadPixels(f"a TIFF of {page.photometric!s} and axes {page.axes}")
        if samples > 4:
            raise BadPixels(f"a TIFF of {samples} channels; 1 to 4 are read")
        values = page.asarray()
        tag = page.tags.get(ORIENTATION)
    if page.axes == "YX":
        values = values[..., None]
    elif page.axes == "SYX":
        values = np.moveaxis(values, 0, 2)
    return values, samples in (2, 4), int(tag.value) if tag is not None else 1


def upright(orientation: int) -> Image.Transpose | None:
    """What turns a picture of that EXIF orientation upright; None if it is."""
    return _UPRIGHT.get(orientation)
