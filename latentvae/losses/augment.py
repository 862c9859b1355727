"""DiffAugment (Zhao et al. 2020, arXiv:2006.10738): what the discriminator sees, real or not, is
changed at random, and the gradient to the reconstruction passes through.

Random numbers come from the global generator, which the training loop seeds for each micro-step;
each image has its own.

`B` batch, `C` channels, `H W` space. Images are in [-1, 1]; 0 fills what comes in from outside.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.errors import UserError, nearest

_TRANSLATION = 1 / 8  # of the side, either way
_CUTOUT = 1 / 2  # of the side


def diff_augment(images: Tensor, policy: Sequence[str]) -> Tensor:
    """``images`` (B, C, H, W) under each augmentation of ``policy`` in turn, keys of
    `AUGMENTATIONS`; the images themselves for an empty one."""
    for name in policy:
        if name not in AUGMENTATIONS:
            allowed = ", ".join(AUGMENTATIONS)
            hint = nearest(name, AUGMENTATIONS)
            raise UserError(f"no augmentation '{name}': it must be among {allowed}{hint}")
        images = AUGMENTATIONS[name](images)
    return images


def color(images: Tensor) -> Tensor:
    """Brightness by +-0.5, saturation times 0 to 2, contrast times 0.5 to 1.5."""
    images = images + (_uniform(images) - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2.0 * _uniform(images))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_uniform(images) + 0.5)


def translation(images: Tensor) -> Tensor:
    """Shift by up to an eighth of each side, in whole pixels."""
    height, width = images.shape[2:]
    rows = _shifted(images, height)[:, None, :, None]  # (B, 1, H, 1)
    columns = _shifted(images, width)[:, None, None, :]  # (B, 1, 1, W)
    images = F.pad(images, (1, 1, 1, 1))  # of which all that lies outside is taken
    images = images.gather(2, rows.expand(-1, images.shape[1], -1, width + 2))
    return images.gather(3, columns.expand(-1, images.shape[1], height, -1))


def cutout(images: Tensor) -> Tensor:
    """Half of each side set to 0, about a centre anywhere in the image."""
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
    """U(0, 1) for each image, (B, 1, 1, 1)."""
    return torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)


def _shifted(images: Tensor, size: int) -> Tensor:
    """Where each pixel of a side comes from in the side padded by one, (B, size)."""
    most = int(size * _TRANSLATION + 0.5)
    shift = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
    return (torch.arange(size, device=images.device) + shift + 1).clamp(0, size + 1)


def _cut(images: Tensor, size: int) -> Tensor:
    """Which pixels of a side are cut out, (B, size)."""
    length = int(size * _CUTOUT + 0.5)
    centre = torch.randint(size + 1 - length % 2, (len(images), 1), device=images.device)
    distance = torch.arange(size, device=images.device) - (centre - length // 2)
    return (distance >= 0) & (distance < length)
