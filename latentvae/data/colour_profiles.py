"""Convert pictures with an embedded colour profile (ICC) to sRGB.

Pillow's ImageCms (LittleCMS) converts pictures of 8 bits, with the perceptual intent. ImageCms does
not support RGB of more than 8 bits. So this module converts 16-bit and float pictures itself if
their profile consists of three primaries with curves, or of one grey curve (ICC.1:2010, sections
8.3, 10.5 and 10.15). 16-bit and float pictures with any other profile, such as the colour table of
a scanner, are converted at 8 bits.

A profile that changes no colour by more than 1, on the scale from 0 to 255, counts as sRGB and is
not applied. A damaged profile, or a profile of another colour space than its picture, is ignored
with a warning. But a grey picture with a profile for RGB is converted.

Symbols: `H W` height and width in pixels.

"""

import functools
import io
import logging
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageCms

ICC_TAG = 34675  # the TIFF tag of a colour profile
# Maps the colour space of a profile to the Pillow mode in which its pictures are converted.
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# The matrix from linear sRGB to XYZ (D50): IEC 61966-2-1 with Bradford's adaptation, as in
# profiles.
SRGB_TO_XYZ = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)

logger = logging.getLogger(__name__)


def in_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Return a picture of 8 bits with its colours in sRGB.

    Grey stays grey, and alpha is kept. CMYK becomes RGB. A converted picture has no profile.

    Args:
        image: a loaded picture.
        icc: the picture's colour profile. With None, or if the profile is not applied, the picture
            is returned unchanged.
    """
    if not icc or image.mode in ("1", "LAB", "HSV", "F") or image.mode.startswith("I"):
        return image

    # a transparent colour or a palette's alpha becomes an alpha channel
    given = image
    if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if image.mode in ("L", "La") else "RGBA")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    grey = image.mode in ("L", "LA")

    # colours
    mode = "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB"
    plain = image if image.mode == mode else image.convert(mode)
    converted = _converted(plain, icc)
    if converted is None:
        return given
    if grey:
        converted = converted.convert("L")
    if alpha is not None:
        converted.putalpha(alpha)
    converted.info = {
        k: v for k, v in image.info.items() if k not in ("icc_profile", "transparency")
    }
    return converted


def _converted(image: Image.Image, icc: bytes) -> Image.Image | None:
    """Convert a picture of mode "L", "RGB" or "CMYK" to sRGB. Return None if nothing changes."""
    space = profile_space(icc)
    if image.mode == "L" and space == "RGB":
        image = image.convert("RGB")  # a grey picture with a profile for RGB
    if space is None or MODES[space] != image.mode:
        if space is not None:
            _say_mismatch(space, image.mode)
        return None
    transform = _transform(icc)
    return None if transform is None else ImageCms.applyTransform(image, transform)


@functools.lru_cache(maxsize=64)
def profile_space(icc: bytes) -> str | None:
    """Return the colour space of a profile: a key of `MODES`, or None for an unusable profile."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space: str = profile.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]
    # A damaged profile raises OSError. Pillow without LittleCMS raises ImportError.
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError, ImportError) as error:
        _say_ignored(f"the profile cannot be read ({error})")
        return None
    if space not in MODES:
        _say_ignored(f"the profile's colour space is {space}, not RGB, GRAY or CMYK")
        return None
    return space


@functools.lru_cache(maxsize=64)
def _transform(icc: bytes) -> ImageCms.ImageCmsTransform | None:
    """Return Pillow's transform from a profile to sRGB, or None for an sRGB or unusable profile."""
    space = profile_space(icc)
    assert space is not None
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(icc)),
            ImageCms.createProfile("sRGB"),
            MODES[space],
            "RGB",
        )
    except (OSError, ImageCms.PyCMSError) as error:
        _say_ignored(f"Pillow cannot convert the profile to sRGB ({error})")
        return None
    if space == "CMYK":
        return transform

    # Does the profile change any colour?
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    red, green, blue = np.meshgrid(steps, steps, steps)
    colours = np.stack([red, green, blue], axis=-1).reshape(1, -1, 3)
    grey = np.arange(256, dtype=np.uint8)[None]
    given = Image.fromarray(colours if space == "RGB" else grey)
    found = np.asarray(ImageCms.applyTransform(given, transform)).astype(int)
    expected = np.asarray(given.convert("RGB")).astype(int)
    return None if np.abs(found - expected).max() <= 1 else transform


def planes_in_srgb(planes: Sequence[np.ndarray], icc: bytes | None) -> list[np.ndarray]:
    """Convert the colour planes of a picture of more than 8 bits to sRGB, and return them.

    Args:
        planes: one grey plane, or a red, a green and a blue plane, each (H, W), float32 in [-1, 1].
        icc: the profile of the picture. With None, the planes are returned unchanged.
    """
    space = profile_space(icc) if icc else None
    if not icc or space is None or _transform(icc) is None:
        return list(planes)
    if space not in ("RGB", "GRAY") or (space == "GRAY" and len(planes) == 3):
        _say_mismatch(space, "grey" if len(planes) == 1 else "RGB")
        return list(planes)

    # convert by curves and primaries
    units = [(plane.astype(np.float64) + 1) / 2 for plane in planes]
    if (curves := _curves(icc, space)) is not None:
        units = units * 3 if space == "RGB" and len(units) == 1 else units
        linear = np.stack([curve(unit) for curve, unit in zip(curves, units, strict=True)])
        if space == "RGB":
            matrix = np.linalg.inv(SRGB_TO_XYZ) @ _primaries(icc)
            linear = np.einsum("ij,jhw->ihw", matrix, linear)
        found = list(_srgb_encoded(linear))

    # convert at 8 bits
    else:
        levels = [Image.fromarray(np.rint(255 * unit).astype(np.uint8)) for unit in units]
        image = levels[0] if len(levels) == 1 else Image.merge("RGB", levels)
        values = np.asarray(in_srgb(image, icc)) / 255
        found = [values] if values.ndim == 2 else list(np.moveaxis(values, 2, 0))
    return [(2 * unit - 1).astype(np.float32) for unit in found[: len(planes)]]


def _srgb_encoded(linear: np.ndarray) -> np.ndarray:
    """Convert linear light in [0, 1] to sRGB values in [0, 1]."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# A profile lists its tags as (name, offset, size), from byte 132 on. All numbers are big-endian.


def _tags(icc: bytes) -> dict[str, bytes]:
    (count,) = struct.unpack_from(">I", icc, 128)
    entries = (struct.unpack_from(">4sII", icc, 132 + 12 * i) for i in range(min(count, 100)))
    return {name.decode("latin-1"): icc[start : start + size] for name, start, size in entries}


def _primaries(icc: bytes) -> np.ndarray:
    """Return a profile's red, green and blue primaries in XYZ (D50), one in each column."""
    tags = _tags(icc)
    columns = [struct.unpack_from(">3i", tags[f"{name}XYZ"], 8) for name in "rgb"]
    return np.array(columns).T / 65536


def _curves(icc: bytes, space: str) -> "list[Curve] | None":
    """Return a profile's tone curves, or None if the profile has a colour table or is damaged."""
    try:
        tags = _tags(icc)
        if "A2B0" in tags:  # a table, which has precedence over curves
            return None
        names = ("kTRC",) if space == "GRAY" else ("rTRC", "gTRC", "bTRC")
        if space == "RGB":
            _primaries(icc)
        return [Curve(tags[name]) for name in names]
    except (KeyError, ValueError, struct.error):
        return None


class Curve:
    """A profile's tone curve, which maps stored numbers in [0, 1] to linear light in [0, 1].

    Args:
        data: the bytes of a tag of type `curv` or `para`.

    Raises:
        ValueError, struct.error: the tag is damaged or of another type.
    """

    def __init__(self, data: bytes) -> None:
        kind = data[:4]
        self.table = np.empty(0)
        self.parameters: tuple[float, ...] = (1.0,)
        if kind == b"curv":
            (count,) = struct.unpack_from(">I", data, 8)
            values = struct.unpack_from(f">{count}H", data, 12)
            if count == 1:
                self.parameters = (values[0] / 256,)
            elif count > 1:
                self.table = np.array(values) / 65535
        elif kind == b"para":
            (function,) = struct.unpack_from(">H", data, 8)
            count = {0: 1, 1: 3, 2: 4, 3: 5, 4: 7}.get(function)
            if count is None:
                raise ValueError(f"unknown function {function}")
            values = struct.unpack_from(f">{count}i", data, 12)
            self.parameters = tuple(value / 65536 for value in values)
        else:
            raise ValueError(f"unknown curve {kind!r}")

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if len(self.table):
            return np.interp(values, np.linspace(0, 1, len(self.table)), self.table)
        return _parametric(values, *self.parameters)


def _parametric(x: np.ndarray, g: float, *rest: float) -> np.ndarray:
    """Return the values at `x` of a parametric curve of ICC.1:2010, section 10.15.

    `g` and `rest` are the parameters of the curve. The number of parameters tells which of the
    curve types 0 to 4 is meant.
    """
    if not rest:
        return x**g
    a, b = rest[:2]
    if len(rest) == 2:  # (a x + b)^g for x >= -b / a, else 0
        return np.where(x >= -b / a, np.maximum(a * x + b, 0) ** g, 0.0)
    if len(rest) == 3:  # the same curve plus c
        return np.where(x >= -b / a, np.maximum(a * x + b, 0) ** g, 0.0) + rest[2]
    c, d, e, f = (*rest[2:], 0.0, 0.0)[:4]  # (a x + b)^g + e for x >= d, else c x + f
    return np.where(x >= d, np.maximum(a * x + b, 0) ** g + e, c * x + f)


@functools.cache
def _say_mismatch(space: str, mode: str) -> None:
    _say_ignored(f"the profile is for {space} and the picture is {mode}")


@functools.cache
def _say_ignored(reason: str) -> None:
    """Log a warning that says why a profile is ignored, once per reason and process."""
    logger.warning("An embedded colour profile is ignored and sRGB is assumed: %s.", reason)
