"""Images in memory, and binary images made of grey ones.

Symbols: `N` images, `B` batch, `C` channels, `H W` image size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from latentvae.data import BadImages, Batch, EvalTransform, ImageSource, validation_batches

READ_BATCH = 256


def read_all(source: ImageSource, transform: EvalTransform, *, bad: BadImages) -> Tensor:
    """Return all readable images as bytes, (N, C, H, W), uint8.

    Args:
        source: the images.
        transform: gives every image the same size.
        bad: collects the unreadable files, which are left out.
    """
    parts = [
        to_bytes(images)
        for images, _ in validation_batches(source, transform, batch_size=READ_BATCH, bad=bad)
    ]
    return torch.cat(parts)


def to_bytes(images: Tensor) -> Tensor:
    """Map pixels in [-1, 1] to 0 .. 255, uint8."""
    return ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def batches_of(pixels: Tensor, steps: Iterator[list[tuple[int, int]]]) -> Iterator[Batch]:
    """Yield a batch for each list of (epoch, index)."""
    for step in steps:
        indices = torch.tensor([index for _, index in step])
        yield Batch(pixels[indices], indices, [])


def binary(images: Tensor, kind: str, *, generator: torch.Generator | None = None) -> Tensor:
    """Return images of -1 and 1.

    Args:
        images: grey values in [-1, 1].
        kind: "threshold" cuts at 0. Otherwise a pixel is 1 with probability (1 + x) / 2.
        generator: draws the pixels. None is torch's global generator.
    """
    if kind == "threshold":
        return torch.where(images > 0, 1.0, -1.0)
    shares = (images + 1.0) / 2.0
    return 2.0 * torch.bernoulli(shares.clamp(0.0, 1.0), generator=generator) - 1.0


def binary_bytes(pixels: Tensor, *, seed: int) -> Tensor:
    """Draw binary images once, as bytes 0 and 255. `pixels` are bytes, (N, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    shares = pixels.float() / 255.0
    return (torch.bernoulli(shares, generator=generator) * 255.0).to(torch.uint8)
