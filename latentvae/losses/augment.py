"""DiffAugment (Zhao et al. 2020, arXiv:2006.10738): random, differentiable image changes.

All images that the discriminator sees, real ones and reconstructions, are changed at random. The
gradient to the reconstruction passes through the change. Each image has its own random numbers. The
numbers come from the global generator, which the training loop seeds for each micro-step.

`B` batch, `C` channels, `H W` space. Images are in [-1, 1]. Pixels that come from outside the image
are 0, which is grey.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.errors import UserError, nearest

_TRANSLATION = 1 / 8  # largest shift, as a share of the side
_CUTOUT = 1 / 2  # side of the cut rectangle, as a share of the image's side


def diff_augment(images: Tensor, policy: Sequence[str]) -> Tensor:
    """Return ``images`` (B, C, H, W) changed by each augmentation of ``policy``, one after another.

    Args:
        policy: keys of `AUGMENTATIONS`. With an empty policy the images come back unchanged.

    Raises:
        UserError: a name in `policy` is not a key of `AUGMENTATIONS`.
    """
    for name in policy:
        if name not in AUGMENTATIONS:
            allowed = ", ".join(AUGMENTATIONS)
            hint = nearest(name, AUGMENTATIONS)
            raise UserError(f"An augmentation must be one of {allowed} (got '{name}'){hint}")
        images = AUGMENTATIONS[name](images)
    return images


def color(images: Tensor) -> Tensor:
    """Return images with a random brightness, saturation and contrast for each image.

    Brightness changes by up to 0.5. The factor is from 0 to 2 for saturation and from 0.5 to 1.5
    for contrast.
    """
    images = images + (_uniform(images) - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2.0 * _uniform(images))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_uniform(images) + 0.5)


def translation(images: Tensor) -> Tensor:
    """Return images, each shifted at random by up to an eighth of its sides, in whole pixels."""
    height, width = images.shape[2:]
    rows = _shifted(images, height)[:, None, :, None]  # (B, 1, H, 1)
    columns = _shifted(images, width)[:, None, None, :]  # (B, 1, 1, W)
    images = F.pad(images, (1, 1, 1, 1))  # this border represents all pixels outside
    images = images.gather(2, rows.expand(-1, images.shape[1], -1, width + 2))
    return images.gather(3, columns.expand(-1, images.shape[1], height, -1))


def cutout(images: Tensor) -> Tensor:
    """Return images in which a rectangle at a random place is 0. Its sides are half the image's."""
    height, width = images.shape[2:]
    rows = _cut(images, height)[:, None, :, None]
    columns = _cut(images, width)[:, None, None, :]
    return images * ~(rows & columns)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}


def _uniform(images: Tensor) -> Tensor:
    """Return a number from U(0, 1) for each image, (B, 1, 1, 1)."""
    return torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)


def _shifted(images: Tensor, size: int) -> Tensor:
    """Return the source of each pixel of a shifted side, (B, size).

    A source is a position in the side after padding by one pixel.
    """
    most = int(size * _TRANSLATION + 0.5)
    shift = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
    return (torch.arange(size, device=images.device) + shift + 1).clamp(0, size + 1)


def _cut(images: Tensor, size: int) -> Tensor:
    """Return a mask (B, size) that is true for the pixels of a side that are set to 0."""
    length = int(size * _CUTOUT + 0.5)
    centre = torch.randint(size + 1 - length % 2, (len(images), 1), device=images.device)
    distance = torch.arange(size, device=images.device) - (centre - length // 2)
    return (distance >= 0) & (distance < length)
