"""Represent pictures for which Pillow has no image mode, as planes of floats in [-1, 1].

8-bit pictures stay Pillow images, which are fast. Pictures of 16 bits, of floats, or with a stated
`value_range` (see `PixelFormat`) become a `DeepImage`. This class has the methods of a Pillow image
that the transforms use. Nothing is rounded to 8 bits between the file and the tensor, unless the
file has a colour profile that only Pillow can convert (see `colour_profiles`).

Symbols: `C` channels, `H W` height and width in pixels. A picture is grey (C = 1), grey and alpha
(2), RGB (3) or RGBA (4).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentvae.data.colour_profiles import planes_in_srgb
from latentvae.errors import UserError

INTEGER_TOP = 65535  # the number for white in integers of more than 8 bits, if no range is stated
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode "L"


class BadPixels(ValueError):
    """The stored numbers are not a picture. The message says why, in a few words."""


@dataclass(frozen=True)
class PixelFormat:
    """The format to which every image file is converted.

    Attributes:
        channels: 1 (grey, the luma of colours), 3 (RGB, grey is repeated) or 4 (RGBA, opaque if
            the file has no alpha). With 1 or 3, transparency is composited over white.
        value_range: the stored numbers that become -1 and 1. Numbers outside this range are
            clipped. None means the range of the type: 0..255 for 8 bits, 0..65535 for wider
            integers. Signed 8-bit numbers need a stated range, and so do floats if
            ``channels`` is 1 or 4. If ``channels`` is 3, the range of floats is 0 to 1 if no value
            exceeds 1, else 0 to 255. Alpha always uses the range of its type, which is 0 to 1 for
            floats.
        ignore_icc: keep the stored numbers of files with an embedded colour profile. By default
            these numbers are converted to sRGB.
        keep_depth: return pictures of more than 8 bits as a `DeepImage`. Otherwise every picture
            has 8 bits. A picture that Pillow can read is then RGB without transparency, and
            ``channels`` and ``value_range`` have no effect on it.
        max_pixels: largest allowed number of pixels of a file. None means Pillow's own limit.
        all_pages: make every page of a TIFF a separate image. Otherwise the first page is used.

    Raises:
        UserError: the range is not finite, or its first number is not the smaller one.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    ignore_icc: bool = False
    keep_depth: bool = True
    max_pixels: int | None = None
    all_pages: bool = False

    def __post_init__(self) -> None:
        if self.value_range is None:
            return
        low, high = self.value_range
        if not -math.inf < low < high < math.inf:
            raise UserError(
                "value_range must be the number that becomes black, then a greater one that "
                f"becomes white (got {low:g} {high:g})."
            )


class DeepImage:
    """A picture as one float32 plane per channel, in [-1, 1].

    Args:
        planes: Pillow images of mode "F" and of equal size, one for each channel of grey, RGB or
            RGBA.
    """

    def __init__(self, planes: Sequence[Image.Image]) -> None:
        self.planes = tuple(planes)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.planes[0].size

    def resize(
        self,
        size: tuple[int, int],
        resample: Image.Resampling,
        *,
        box: tuple[float, float, float, float] | None = None,
        reducing_gap: float | None = None,
    ) -> "DeepImage":
        """Resize as `PIL.Image.Image.resize` does.

        Values that overshoot [-1, 1] are clipped. Colours are weighted by their alpha.
        """

        def resized(values: np.ndarray) -> np.ndarray:
            plane = Image.fromarray(values)
            return np.asarray(plane.resize(size, resample, box=box, reducing_gap=reducing_gap))

        # without alpha
        planes = [np.asarray(plane) for plane in self.planes]
        whole = size == self.size and box in (None, (0, 0, *size))
        if whole or len(planes) < 4 or planes[3].min() == 1:
            return _from_planes([resized(plane) for plane in planes])

        # colours weighted by alpha
        *colour, alpha = ((plane + 1) / 2 for plane in planes)
        weight = resized(alpha)
        sums = [resized(plane * alpha) for plane in colour]
        means = [np.divide(s, weight, out=np.zeros_like(s), where=weight > 1e-6) for s in sums]
        return _from_planes([2 * values - 1 for values in (*means, weight)])

    def transpose(self, method: Image.Transpose) -> "DeepImage":
        """Flip or rotate as `PIL.Image.Image.transpose` does."""
        return DeepImage([plane.transpose(method) for plane in self.planes])

    def to_array(self) -> np.ndarray:
        """Return the planes as one array, (C, H, W), float32 in [-1, 1]."""
        return np.stack([np.asarray(plane) for plane in self.planes])

    def to_8bit(self) -> Image.Image:
        """Return the nearest picture of 8 bits, of mode "L", "RGB" or "RGBA"."""
        levels = np.rint((self.to_array() + 1) * 127.5).astype(np.uint8)
        planes = [Image.fromarray(plane) for plane in levels]
        return Image.merge({1: "L", 3: "RGB", 4: "RGBA"}[len(planes)], planes)


Picture = Image.Image | DeepImage
EIGHT_BIT = PixelFormat(keep_depth=False)  # 8-bit RGB, for display and comparison with codecs


def deep_image(
    values: np.ndarray,
    pixels: PixelFormat,
    *,
    alpha: bool,
    white_is_zero: bool = False,
    icc: bytes | None = None,
) -> DeepImage:
    """Convert the numbers that are stored in a file to the picture that they represent.

    Args:
        values: (H, W, C), of booleans, integers or floats.
        pixels: channels and range of the picture.
        alpha: whether the last channel is alpha.
        white_is_zero: whether the lowest number means white. If True, the ends of the range are
            swapped.
        icc: the colour profile of the numbers.

    Raises:
        BadPixels: the numbers are not finite, or their range is unknown.
    """
    # errors for numbers that are no picture
    kind, count = values.dtype.kind, values.shape[2] - alpha
    if values.size == 0:
        raise BadPixels("it has no pixels")
    if kind not in "buif":
        raise BadPixels(f"the file holds values of type {values.dtype}, not pixel values")
    if kind == "f" and not np.isfinite(values).all():
        raise BadPixels("some of the file's float values are not finite")

    # to [-1, 1]
    low, high = pixels.value_range or _own_range(values[..., :count], pixels)
    if white_is_zero:
        low, high = high, low
    colour = [_scaled(values[..., i], low, high) for i in range(count)]
    if not pixels.ignore_icc:
        colour = planes_in_srgb(colour, icc)
    veil = _scaled(values[..., count], 0, type_top(values.dtype)) if alpha else None
    return _from_planes(_arranged(colour, veil, pixels.channels))


def _own_range(colour: np.ndarray, pixels: PixelFormat) -> tuple[float, float]:
    if colour.dtype == np.int8:
        raise BadPixels(
            "the file's integers are signed 8-bit: value_range must say what is black and white"
        )
    if colour.dtype.kind != "f":
        top = type_top(colour.dtype)
        if top == INTEGER_TOP and (colour.min() < 0 or colour.max() > top):
            raise BadPixels(
                "some of the file's integers lie outside 0..65535: value_range must say what is "
                "black and white"
            )
        return 0, top
    if pixels.channels != 3:
        raise BadPixels(
            "the file's values are floats: value_range must say what is black and white"
        )
    return 0, 1 if colour.max() <= 1 else 255


def type_top(dtype: np.dtype) -> int:
    """Return the number that means white, or opaque, in a data type."""
    if dtype.kind in "bf":
        return 1
    return np.iinfo(dtype).max if dtype.itemsize == 1 else INTEGER_TOP


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values from the range `low` to `high` to [-1, 1], and return them as float32.

    The computation is in float64, which keeps 32-bit integers distinct.
    """
    unit = (values.astype(np.float64) - low) / (high - low)
    return (2 * np.clip(unit, 0, 1) - 1).astype(np.float32)


def _arranged(
    colour: list[np.ndarray], alpha: np.ndarray | None, channels: int
) -> list[np.ndarray]:
    """Convert one or three colour planes, with or without alpha, to the requested channels."""
    if channels < 4 and alpha is not None:
        colour = [1 + (plane - 1) * (alpha + 1) / 2 for plane in colour]  # composited over white
    if channels == 1 and len(colour) == 3:
        return [sum(share * plane for share, plane in zip(_LUMA, colour, strict=True))]  # pyright: ignore[reportReturnType]
    if channels == 1:
        return colour
    rgb = colour * 3 if len(colour) == 1 else colour
    if channels == 3:
        return rgb
    return [*rgb, np.ones_like(rgb[0]) if alpha is None else alpha]


def _from_planes(planes: Sequence[np.ndarray]) -> DeepImage:
    clipped = (np.clip(plane, -1, 1, dtype=np.float32) for plane in planes)
    return DeepImage([Image.fromarray(plane) for plane in clipped])
