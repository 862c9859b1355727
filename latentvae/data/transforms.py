"""From a picture to a (C, R, R) tensor in [-1, 1]: a square window, resized by Pillow.

Every window is a square of whole source pixels and the resize is antialiased, so "resize the
shorter side to R, then crop R x R" is one resize of a window ``min(H, W)`` wide; a small image is
enlarged, and one whose shorter side is R already is not resampled. ``R`` is in pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentvae.data.pixels import DeepImage, Picture
from latentvae.errors import UserError, nearest

INTERPOLATIONS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
CROPS = ("random_resized", "random", "center")
# Pillow's own value for thumbnails: decode or reduce to twice the size, resample the rest.
REDUCING_GAP = 2.0


@dataclass(frozen=True)
class Window:
    """Where to look, for an image of any size.

    Attributes:
        share: side of the square as a share of the image's shorter side, in (0, 1].
        x, y: position in the free space, 0 (left, top) to 1 (right, bottom).
        flip: mirror left and right.
    """

    share: float = 1.0
    x: float = 0.5
    y: float = 0.5
    flip: bool = False

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels of an image of ``size`` (width, height)."""
        side = max(1, round(self.share * min(size)))
        left, top = (int(p * (s - side) + 0.5) for p, s in zip((self.x, self.y), size, strict=True))
        return left, top, left + side, top + side


class TrainTransform:
    """Crop, resize and flip at random: ``image -> (C, R, R)``, float32 in [-1, 1].

    Args:
        resolution: R, in pixels.
        crop: ``"random_resized"`` takes a square of ``crop_scale`` times the shorter side (the
            crop of latent diffusion's ImageNet training, ldm/data/imagenet.py); ``"random"``
            resizes the shorter side to R and crops R x R anywhere; ``"center"`` does so in the
            middle.
        crop_scale: least and greatest side of a random resized crop as shares of the image's
            shorter side, in (0, 1].
        random_flip: mirror half of the images.
        interpolation: ``"lanczos"``, ``"bicubic"`` or ``"bilinear"``.

    Example:
        transform = TrainTransform(256, crop="random")
        image = transform(photo, np.random.default_rng(0))
    """

    def __init__(
        self,
        resolution: int,
        *,
        crop: str = "random_resized",
        crop_scale: tuple[float, float] = (0.5, 1.0),
        random_flip: bool = False,
        interpolation: str = "lanczos",
    ) -> None:
        if crop not in CROPS:
            raise UserError(
                f"crop is '{crop}'; {', '.join(CROPS)} are possible{nearest(crop, CROPS)}"
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(
                f"crop_scale is {crop_scale}; two rising numbers above 0 and up to 1 are needed"
            )
        self.resolution = _checked_resolution(resolution)
        self.crop = crop
        self.crop_scale = crop_scale if crop == "random_resized" else (1.0, 1.0)
        self.random_flip = random_flip
        self.interpolation = _resampling(interpolation)

    def draw(self, rng: np.random.Generator) -> Window:
        """Draw a window; four numbers are always taken from ``rng``, whatever the options."""
        share, x, y, flip = rng.random(4).tolist()
        low, high = self.crop_scale
        place = (0.5, 0.5) if self.crop == "center" else (x, y)
        return Window(low + share * (high - low), *place, flip=self.random_flip and flip < 0.5)

    def needed_side(self, window: Window) -> int:
        """The shorter side, in pixels, above which a larger image makes the result no better."""
        return math.ceil(REDUCING_GAP * self.resolution / window.share)

    def apply(self, image: Picture, window: Window) -> Tensor:
        """Return that window of the image, (C, R, R)."""
        size = (self.resolution, self.resolution)
        box = window.box(image.size)
        image = image.resize(size, self.interpolation, box=box, reducing_gap=REDUCING_GAP)
        return to_tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if window.flip else image)

    def __call__(self, image: Picture, rng: np.random.Generator) -> Tensor:
        return self.apply(image, self.draw(rng))


class EvalTransform:
    """Resize the shorter side to R and crop the middle: ``image -> (C, R, R)``, float32 in [-1, 1].

    Args:
        resolution: R, in pixels.
        interpolation: ``"lanczos"``, ``"bicubic"`` or ``"bilinear"``.
    """

    def __init__(self, resolution: int, *, interpolation: str = "lanczos") -> None:
        self.resolution = _checked_resolution(resolution)
        self.interpolation = _resampling(interpolation)

    def __call__(self, image: Picture) -> Tensor:
        size = (self.resolution, self.resolution)
        return to_tensor(image.resize(size, self.interpolation, box=Window().box(image.size)))


def to_tensor(image: Picture) -> Tensor:
    """Return an image as (C, H, W), float32 in [-1, 1]; of 8 bits 0 becomes -1 and 255 becomes 1.

    Pillow images are of mode "L", "RGB" or "RGBA": C is 1, 3 or 4.
    """
    if isinstance(image, DeepImage):
        return torch.from_numpy(image.to_array())
    pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, C), uint8
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)  # (C, H, W)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def _checked_resolution(resolution: int) -> int:
    if resolution < 1:
        raise UserError(f"the resolution is {resolution}; a number of pixels above 0 is needed")
    return resolution


def _resampling(name: str) -> Image.Resampling:
    if name not in INTERPOLATIONS:
        allowed = ", ".join(INTERPOLATIONS)
        raise UserError(
            f"interpolation is '{name}'; {allowed} are possible{nearest(name, INTERPOLATIONS)}"
        )
    return INTERPOLATIONS[name]
