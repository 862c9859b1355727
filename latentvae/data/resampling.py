"""Resize a window of a picture by torch (fast, vectorised kernels for 8 bits) or by Pillow.

Torch and Pillow antialias with the same kernels, but torch rounds the kernel weights differently:
about one value in 200 differs, by 1 on the scale from 0 to 255. Torch resizes windows whose sides
are one to four times those of the output, if torch supports the kernel. Pillow resizes in all other
cases: small windows that are enlarged, larger windows (first reduced to at least twice the output
size), pictures with alpha (which weights the colours), and every `DeepImage` (such as a picture of
more than 8 bits).

Symbols: `C` channels, `H W` height and width in pixels.
"""

import functools
from typing import Literal, get_args

import numpy as np
import pyarrow
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentvae.data.pixels import DeepImage, Picture
from latentvae.errors import UserError, nearest

INTERPOLATIONS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
SUPPORT = {"lanczos": 3, "bicubic": 2, "bilinear": 1}  # radius of each kernel in pixels
Resizer = Literal["torch", "pillow"]
# Pillow's own value for thumbnails: reduce to twice the size first, then resample.
REDUCING_GAP = 2.0

Box = tuple[int, int, int, int]


def check_interpolation(name: str) -> str:
    """Return the name of a resampling kernel. Raise an error if the name is unknown."""
    if name not in INTERPOLATIONS:
        allowed = ", ".join(INTERPOLATIONS)
        raise UserError(
            f"interpolation must be one of {allowed} (got '{name}'){nearest(name, INTERPOLATIONS)}"
        )
    return name


def check_resizer(name: str) -> str:
    """Return the name of a resizer. Raise an error if the name is unknown."""
    if name not in get_args(Resizer):
        raise UserError(
            f"resize_with must be {' or '.join(get_args(Resizer))} (got '{name}')"
            f"{nearest(name, get_args(Resizer))}"
        )
    return name


def resized_window(
    image: Picture, box: Box, size: tuple[int, int], *, interpolation: str, resize_with: str
) -> Tensor:
    """Return a resized window of a picture, (C, H, W), with values as `pixels_of` returns them.

    Args:
        image: the picture.
        box: left, top, right and bottom of the window in pixels.
        size: width and height of the result.
        interpolation: ``"lanczos"``, ``"bicubic"`` or ``"bilinear"``.
        resize_with: ``"torch"`` or ``"pillow"``.
    """
    steps = ((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
    if (
        resize_with == "torch"
        and isinstance(image, Image.Image)
        and image.mode in ("L", "RGB")
        and min(steps) >= 1
        and max(steps) < 2 * REDUCING_GAP
        and _torch_has(interpolation)
    ):
        return _by_torch(image, box, size, interpolation)
    kernel = INTERPOLATIONS[interpolation]
    return pixels_of(image.resize(size, kernel, box=box, reducing_gap=REDUCING_GAP))


def _by_torch(image: Image.Image, box: Box, size: tuple[int, int], interpolation: str) -> Tensor:
    window, channels = _window(image, box)[None], len(image.getbands())
    if window.shape[2:] == size[::-1]:
        return window[0, :channels].clone(memory_format=torch.contiguous_format)
    window = F.interpolate(window, size=size[::-1], mode=interpolation, antialias=True)
    result = window[0, :channels].clone(memory_format=torch.contiguous_format)
    _look_over_the_edges(result, image, box, interpolation)
    return result


def _look_over_the_edges(result: Tensor, image: Image.Image, box: Box, interpolation: str) -> None:
    """Recompute with Pillow the pixels whose kernel reaches beyond the edges of the window.

    Torch treated the window as the complete picture. Pillow's kernel also uses pixels around the
    window.
    """
    (left, top, right, bottom), (height, width) = box, result.shape[1:]
    across, down = (right - left) / width, (bottom - top) / height  # source pixels per output pixel

    # strips whose kernels reach beyond the window
    reach = SUPPORT[interpolation]
    columns, rows = min(reach, width), min(reach, height)
    strips = (
        (left > 0, (0, columns), (0, height)),
        (right < image.width, (width - columns, width), (0, height)),
        (top > 0, (0, width), (0, rows)),
        (bottom < image.height, (0, width), (height - rows, height)),
    )

    # resized by Pillow
    for sees_more, (x0, x1), (y0, y1) in strips:
        if not sees_more:
            continue
        part = (
            left + x0 * across,
            top + y0 * down,
            right - (width - x1) * across,
            bottom - (height - y1) * down,
        )
        strip = image.resize((x1 - x0, y1 - y0), INTERPOLATIONS[interpolation], box=part)
        result[:, y0:y1, x0:x1] = pixels_of(strip)


def _window(image: Image.Image, box: Box) -> Tensor:
    """Return the window as (C, H, W), uint8.

    For RGB, C may be 4, because Pillow stores RGB with a fourth channel that it does not use.
    """
    (width, height), (left, top, right, bottom) = image.size, box
    try:
        stored = pyarrow.array(image)  # pyright: ignore[reportArgumentType]
    except ValueError:  # Pillow keeps large pictures in several blocks of memory
        return _channels_first(np.array(image.crop(box)))
    pixels = torch.from_dlpack(stored if image.mode == "L" else stored.flatten())
    # Do not copy the pixels, because allocating memory is slow.
    window = pixels.view(height, width, -1)[top:bottom, left:right]
    return window.permute(2, 0, 1)


@functools.cache
def _torch_has(interpolation: str) -> bool:
    picture = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    try:
        F.interpolate(picture, size=(2, 2), mode=interpolation, antialias=True)
    except (NotImplementedError, ValueError):  # raised by older versions of torch
        return False
    return True


def pixels_of(image: Picture) -> Tensor:
    """Return an image as (C, H, W): uint8 for 8 bits, float32 in [-1, 1] for a `DeepImage`.

    Pillow images are of mode "L", "RGB" or "RGBA": C is 1, 3 or 4.
    """
    if isinstance(image, DeepImage):
        return torch.from_numpy(image.to_array())
    return _channels_first(np.array(image)).contiguous()


def _channels_first(pixels: np.ndarray) -> Tensor:
    """Convert an array (H, W) or (H, W, C) to a tensor (C, H, W)."""
    tensor = torch.from_numpy(pixels)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def normalised(pixels: Tensor) -> Tensor:
    """Convert the result of `pixels_of` to float32 in [-1, 1], on the same device.

    8-bit values from 0 to 255 become -1 to 1.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    # Divide by a tensor, which gives the same bits on every device. With a plain number, CUDA would
    # multiply by the reciprocal.
    half = torch.full((), 127.5, device=pixels.device)
    return pixels.to(torch.float32).div_(half).sub_(1)
