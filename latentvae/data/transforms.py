"""Convert a picture to a (C, H, W) tensor: choose a window of the right shape and resize it.

A window consists of whole source pixels, and the resize is antialiased. So "resize the shorter side
to R, then crop R x R" is one resize of a window as wide as the shorter side. A small image is
enlarged. An image whose shorter side is R already is not resampled. If the output is not square,
the window is the largest window with the output's aspect ratio. ``R``, and ``H W``, are in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentvae.data.pixels import Picture
from latentvae.data.resampling import (
    INTERPOLATIONS,
    REDUCING_GAP,
    check_interpolation,
    check_resizer,
    normalised,
    pixels_of,
    resized_window,
)
from latentvae.errors import UserError, nearest

CROPS = ("random_resized", "random", "center")


@dataclass(frozen=True)
class Window:
    """The relative size and position of a crop window, which can be used for any image size.

    Attributes:
        share: side of the window divided by the side of the largest window of the same shape that
            fits into the image, in (0, 1].
        x, y: position of the window, from 0 (at the left or top edge) to 1 (right or bottom edge).
        flip: whether to mirror left and right.
    """

    share: float = 1.0
    x: float = 0.5
    y: float = 0.5
    flip: bool = False

    def box(
        self, size: tuple[int, int], shape: tuple[int, int] = (1, 1)
    ) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the window in pixels.

        Args:
            size: width and height of the image in pixels.
            shape: width and height that give the proportions of the window.
        """
        (width, height), (across, down) = size, shape
        largest = min(width, height * across / down), min(height, width * down / across)
        sides = [max(1, round(self.share * side)) for side in largest]
        places = zip((self.x, self.y), size, sides, strict=True)
        left, top = (int(p * (s - side) + 0.5) for p, s, side in places)
        return left, top, left + sides[0], top + sides[1]


class TrainTransform:
    """Crop, resize and flip an image at random: ``image -> (C, H, W)``, float32 in [-1, 1].

    Args:
        resolution: height and width in pixels, or one number R for both.
        crop: ``"random_resized"`` takes a window of random size (see ``crop_scale``) at a random
            place (the crop of latent diffusion's ImageNet training, ldm/data/imagenet.py).
            ``"random"`` resizes the shorter side to R and crops R x R at a random place.
            ``"center"`` resizes in the same way, but crops in the middle.
        crop_scale: smallest and largest side of a random resized crop, as fractions of the image's
            shorter side, in (0, 1]. If the output is not square, they are fractions of the side of
            the largest window with the output's aspect ratio.
        random_flip: mirror each image left to right with a probability of one half.
        interpolation: ``"lanczos"``, ``"bicubic"`` or ``"bilinear"``.
        resize_with: ``"torch"``, which is fast, or ``"pillow"``, as in validation. See
            `resampling`.
        jpeg_draft: decode large JPEGs at reduced size, if each side of the window keeps at least
            twice as many pixels as the same side of the output.

    Example:
        transform = TrainTransform(256, crop="random")
        image = transform(photo, np.random.default_rng(0))
    """

    def __init__(
        self,
        resolution: int | tuple[int, int],
        *,
        crop: str = "random_resized",
        crop_scale: tuple[float, float] = (0.5, 1.0),
        random_flip: bool = False,
        interpolation: str = "lanczos",
        resize_with: str = "torch",
        jpeg_draft: bool = True,
    ) -> None:
        if crop not in CROPS:
            raise UserError(
                f"crop must be one of {', '.join(CROPS)} (got '{crop}'){nearest(crop, CROPS)}"
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(
                "crop_scale must be two rising numbers above 0 and up to 1 (got "
                f"{crop_scale[0]:g} {crop_scale[1]:g})."
            )

        self.size = _checked_size(resolution)
        self.crop = crop
        self.crop_scale = crop_scale if crop == "random_resized" else (1.0, 1.0)
        self.random_flip = random_flip
        self.interpolation = check_interpolation(interpolation)
        self.resize_with = check_resizer(resize_with)
        self.jpeg_draft = jpeg_draft

    def draw(self, rng: np.random.Generator) -> Window:
        """Draw a random window.

        The method always draws four numbers from ``rng``, even if the options need fewer numbers.
        """
        share, x, y, flip = rng.random(4).tolist()
        low, high = self.crop_scale
        place = (0.5, 0.5) if self.crop == "center" else (x, y)
        return Window(low + share * (high - low), *place, flip=self.random_flip and flip < 0.5)

    def needed_side(
        self, windows: Sequence[Window], size: tuple[int, int] | None = None
    ) -> int | None:
        """Return the smallest allowed length of a decoded JPEG's shorter side, in pixels.

        None means that JPEGs are decoded at full size.

        With this length, each side of the narrowest window has at least twice as many pixels as the
        same side of the output. The factor 2 is needed because JPEG decoders shrink an image
        blockwise. Compared with crops of the image decoded at full size, crops of the shrunk image
        have a PSNR of 47 dB. The PSNR would be 43 dB with the factor 1.5, and 38 dB with the factor
        1 (means over photos of BSDS500 at JPEG quality 90).
        """
        if not self.jpeg_draft:
            return None
        share = min(window.share for window in windows)
        return math.ceil(REDUCING_GAP * max(size or self.size) / share)

    def apply(self, image: Picture, window: Window, size: tuple[int, int] | None = None) -> Tensor:
        """Return a resized window, (C, H, W): uint8, or float32 in [-1, 1] for a `DeepImage`.

        Args:
            image: the picture.
            window: relative size and position of the crop, and whether to flip it.
            size: height and width of the image's bucket (see `Buckets`). None means the
                transform's resolution.
        """
        height, width = size or self.size
        pixels = resized_window(
            image,
            window.box(image.size, (width, height)),
            (width, height),
            interpolation=self.interpolation,
            resize_with=self.resize_with,
        )
        return pixels.flip(2) if window.flip else pixels

    def crops(
        self, image: Picture, windows: Sequence[Window], size: tuple[int, int] | None = None
    ) -> Tensor:
        """Return several resized windows of the image in one tensor, (N, C, H, W)."""
        return torch.stack([self.apply(image, window, size) for window in windows])

    def __call__(self, image: Picture, rng: np.random.Generator) -> Tensor:
        return normalised(self.apply(image, self.draw(rng)))


class EvalTransform:
    """Resize an image and crop its middle: ``image -> (C, H, W)``, float32 in [-1, 1].

    Args:
        resolution: height and width in pixels, or one number R for both.
        interpolation: ``"lanczos"``, ``"bicubic"`` or ``"bilinear"``.
    """

    def __init__(
        self, resolution: int | tuple[int, int], *, interpolation: str = "lanczos"
    ) -> None:
        self.size = _checked_size(resolution)
        self.interpolation = INTERPOLATIONS[check_interpolation(interpolation)]

    def __call__(self, image: Picture) -> Tensor:
        size = (self.size[1], self.size[0])  # Pillow takes the width first
        return to_tensor(image.resize(size, self.interpolation, box=Window().box(image.size, size)))


def to_tensor(image: Picture) -> Tensor:
    """Return an image as (C, H, W), float32 in [-1, 1]. 8-bit 0 becomes -1, and 255 becomes 1.

    Pillow images are of mode "L", "RGB" or "RGBA": C is 1, 3 or 4.
    """
    return normalised(pixels_of(image))


def _checked_size(resolution: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if min(height, width) < 1:
        raise UserError(f"the resolution must be at least 1 pixel (got {resolution}).")
    return height, width
