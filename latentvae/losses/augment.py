"""Change images by random, differentiable operations: DiffAugment (arXiv:2006.10738).

All images that the discriminator gets, real images and reconstructions, are changed at random. The
gradient to the reconstruction passes through the change. Each image has its own random numbers. The
random numbers come from torch's global generator, which the training loop seeds for each micro-step
(forward and backward pass).

`B` batch, `C` channels, `H W` space. Images are in [-1, 1]. Pixels from outside the image are 0,
which is grey.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.errors import UserError, nearest

_TRANSLATION = 1 / 8  # largest shift, as a share of the side
_CUTOUT = 1 / 2  # side of the cut rectangle, as a share of the image's side


def diff_augment(images: Tensor, policy: Sequence[str]) -> Tensor:
    """Return ``images`` (B, C, H, W), changed by one augmentation after the other.

    Args:
        images: images in [-1, 1].
        policy: names of the augmentations, which are keys of `AUGMENTATIONS`. With an empty policy,
            the images are not changed.

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

    A number from -0.5 to 0.5 is added for brightness. The saturation is multiplied by a number from
    0 to 2, and the contrast by a number from 0.5 to 1.5.
    """
    images = images + (_uniform(images) - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2.0 * _uniform(images))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_uniform(images) + 0.5)


def translation(images: Tensor) -> Tensor:
    """Return images, each shifted at random by whole pixels, by up to an eighth of its sides."""
    height, width = images.shape[2:]
    rows = _shifted(images, height)[:, None, :, None]  # (B, 1, H, 1)
    columns = _shifted(images, width)[:, None, None, :]  # (B, 1, 1, W)
    images = F.pad(images, (1, 1, 1, 1))  # this border stands for all pixels outside the image
    images = images.gather(2, rows.expand(-1, images.shape[1], -1, width + 2))
    return images.gather(3, columns.expand(-1, images.shape[1], height, -1))


def cutout(images: Tensor) -> Tensor:
    """Return images in which a rectangle at a random place is 0.

    The sides of the rectangle are half the sides of the image. A part of the rectangle can lie
    outside the image.
    """
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
    """Return a uniform random number from 0 to 1 for each image, (B, 1, 1, 1)."""
    return torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)


def _shifted(images: Tensor, size: int) -> Tensor:
    """Return the index of the original row for each row (or column) of a shifted image, (B, size).

    The original is padded by one pixel, so its first row has the index 1. Each of the B images has
    its own random shift.
    """
    most = int(size * _TRANSLATION + 0.5)
    shift = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
    return (torch.arange(size, device=images.device) + shift + 1).clamp(0, size + 1)


def _cut(images: Tensor, size: int) -> Tensor:
    """Return a mask (B, size) that is true for the rows (or columns) of the cut rectangle."""
    length = int(size * _CUTOUT + 0.5)
    centre = torch.randint(size + 1 - length % 2, (len(images), 1), device=images.device)
    distance = torch.arange(size, device=images.device) - (centre - length // 2)
    return (distance >= 0) & (distance < length)
