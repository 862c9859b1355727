"""Draw the 737,280 images of a data set with known factors, and read the images by number.

The data set is like dSprites (Matthey et al. 2017, https://github.com/google-deepmind/dsprites-
dataset): 64 x 64 pixels, white on black, every combination of five factors (shape, scale, rotation,
x and y) exactly once, in the same order as in dSprites. Nothing is downloaded or stored. Every
image is drawn when it is read.

Differences from dSprites:

- Our shapes have other outlines and sizes than in dSprites. So a model's results on our images are
  close to its results on dSprites, but not equal.
- Our 40 rotation angles are k * 2 pi / 40, for k = 0 to 39. In dSprites, the first and the last
  rotation are the same.
- The 32 positions of the centre are one pixel apart, so a shape has the same pixels at every
  position.

A square looks the same after a quarter turn, and an ellipse after a half turn. So some images with
different factors are equal.

`N` images, `F` = 5 factors.
"""

import math
from functools import cache

import numpy as np
from PIL import Image

from latentvae.data.pixels import EIGHT_BIT, Picture, PixelFormat
from latentvae.data.reading import in_format
from latentvae.errors import UserError

SPRITES = "sprites"
SIDE = 64  # side of an image, in pixels
FACTORS = ("shape", "scale", "rotation", "x", "y")
SIZES = (3, 6, 40, 32, 32)  # number of values of each factor
SHAPES = ("square", "ellipse", "heart")
COUNT = math.prod(SIZES)

_CENTER = 16  # pixel of the shape's centre at position 0, and half the side of a stamp
_STAMP = 2 * _CENTER + 1
# Radii in pixels at scale 1, chosen so that no scale and rotation repeats the pixels of another,
# apart from the symmetries above. The areas are about equal, near 320 pixels.
_SQUARE, _ELLIPSE, _HEART = 9.2, (12.9, 7.7), 9.25
_HEART_CENTROID = 0.2935  # height of the centre of mass of the curve, in units of its radius


def sprite_factors(indices: np.ndarray) -> np.ndarray:
    """Return the factors of images, given their numbers: (N, 5), int64, ordered as `FACTORS`.

    Args:
        indices: the numbers of the images, (N,), integers in 0..737,279. From one number to the
            next, the last factor changes fastest.

    Raises:
        UserError: an image number is outside 0..737,279.
    """
    numbers = np.asarray(indices, dtype=np.int64)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < COUNT:
        raise UserError(
            f"the sprites have the numbers 0 to {COUNT - 1} (got {numbers.min()} to "
            f"{numbers.max()})."
        )
    return np.stack(np.unravel_index(numbers, SIZES), axis=-1)


def sprite_indices(factors: np.ndarray) -> np.ndarray:
    """Return the numbers of images, (N,), int64, given their factors (N, 5)."""
    return np.asarray(np.ravel_multi_index(tuple(_checked(factors).T), SIZES))


def sample_sprite_factors(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the factors of `count` images, uniformly and independently: (N, 5), int64."""
    return rng.integers(0, SIZES, size=(count, len(SIZES)))


def draw_sprites(factors: np.ndarray) -> np.ndarray:
    """Draw the images that have the given factors.

    The same factors give the same bytes on every machine.

    Args:
        factors: (N, 5), integers. Factor number i is in 0..SIZES[i] - 1.

    Returns:
        (N, 64, 64), uint8: 0 (black) or 255 (white). Larger `x` is further right and larger `y` is
        further down. Rotations are clockwise.

    Raises:
        UserError: the factors have a wrong shape or a value out of range.
    """
    shape, scale, rotation, x, y = _checked(factors).T
    images = np.zeros((len(shape), SIDE, SIDE), dtype=np.uint8)
    number = np.arange(len(shape))[:, None, None]
    pixels = np.arange(_STAMP)
    rows, columns = y[:, None, None] + pixels[:, None], x[:, None, None] + pixels
    images[number, rows, columns] = _stamps()[shape, scale, rotation]
    return images


class Sprites:
    """An image source that draws the sprites. Image i has the factors `sprite_factors([i])[0]`.

    Args:
        pixels: the format of every image. None means 8-bit RGB. Use `PixelFormat(channels=1)` for
            grey images.

    Example:
        sprites = Sprites(pixels=PixelFormat(channels=1))
        sprites.name(0), sprites.read(0).size  # ("000000", (64, 64))
    """

    def __init__(self, *, pixels: PixelFormat | None = None) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return COUNT

    def name(self, index: int, /) -> str:
        """Return the image's number with six digits."""
        return f"{index:06d}"

    def read(self, index: int, /, *, at_least: int | None = None) -> Picture:
        """Draw an image at its full size. ``at_least`` has no effect."""
        picture = Image.fromarray(draw_sprites(sprite_factors(np.array([index])))[0])
        return in_format(picture, self.pixels or EIGHT_BIT)

    def size(self, index: int, /) -> tuple[int, int]:
        return SIDE, SIDE


def _checked(factors: np.ndarray) -> np.ndarray:
    factors = np.asarray(factors)
    if factors.ndim != 2 or factors.shape[1] != len(SIZES) or factors.dtype.kind not in "iu":
        raise UserError(
            f"factors of sprites are integers (N, {len(SIZES)}), not {factors.dtype} "
            f"{factors.shape}."
        )
    for name, size, values in zip(FACTORS, SIZES, factors.T, strict=True):
        if values.size and not 0 <= values.min() <= values.max() < size:
            raise UserError(
                f"factor {name} must lie in 0..{size - 1} (got {values.min()} to {values.max()})."
            )
    return factors


@cache
def _stamps() -> np.ndarray:
    """Return pictures of all shapes, scales and rotations, centred: (3, 6, 40, 33, 33), uint8.

    Only basic arithmetic and comparisons decide whether a pixel is white. IEEE 754 defines the
    results of these operations to the bit. Sine and cosine may differ in the last bit between
    machines, so they are rounded.
    """
    angles = np.arange(SIZES[2]) * (2 * math.pi / SIZES[2])
    cosine, sine = (np.round(f(angles), 9)[:, None, None] for f in (np.cos, np.sin))
    side = np.arange(-_CENTER, _CENTER + 1.0)
    across, down = side[None, None, :], side[None, :, None]
    turned = across * cosine + down * sine, across * sine - down * cosine  # (40, 33, 33), y up

    stamps = np.empty((*SIZES[:3], _STAMP, _STAMP), dtype=np.uint8)
    for step in range(SIZES[1]):
        scale = (5 + step) / 10
        u, v = turned[0] / scale, turned[1] / scale
        inside = (_in_square(u, v), _in_ellipse(u, v), _in_heart(u, v))
        stamps[:, step] = np.where(np.stack(inside), 255, 0)
    stamps.flags.writeable = False
    return stamps


def _in_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.abs(u) <= _SQUARE) & (np.abs(v) <= _SQUARE)


def _in_ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = u / _ELLIPSE[0], v / _ELLIPSE[1]
    return x * x + y * y <= 1


def _in_heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return whether (x^2 + y^2 - 1)^3 <= x^2 y^3, with the centre of mass at the origin."""
    x, y = u / _HEART, v / _HEART + _HEART_CENTROID
    ring = x * x + y * y - 1
    return ring * ring * ring <= x * x * y * y * y
