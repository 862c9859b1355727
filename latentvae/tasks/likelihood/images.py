"""Keep images in memory, and make binary images from grey images.

Symbols: `N` images, `B` batch, `C` channels, `H W` image size.
"""

import math
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from latentvae.data import BadImages, Batch, EvalTransform, ImageSource, UnreadableImage
from latentvae.errors import UserError, printable

MEMORY_SHARE = 0.8  # share of the free memory that images may take

DRAWN_AT_ONCE = 1024  # images that are made binary at once


def read_all(
    source: ImageSource, transform: EvalTransform, *, bad: BadImages, progress: str | None = None
) -> tuple[Tensor, list[int]]:
    """Return all readable images as bytes, (N, C, H, W), uint8, and their indices in the source.

    Args:
        source: the images.
        transform: transform that gives every image the same size.
        bad: object that collects the unreadable files, which are left out.
        progress: label of a progress bar. None shows no bar.

    Raises:
        UserError: no image can be read.
    """
    pixels, kept = torch.empty(0, dtype=torch.uint8), list[int]()
    for index in tqdm(range(len(source)), desc=progress, disable=progress is None or None):
        try:
            image = to_bytes(transform(source.read(index)))
        except UnreadableImage as error:
            bad.update([(source.name(index), error.reason)])
            continue
        if not kept:
            pixels = torch.empty((len(source), *image.shape), dtype=torch.uint8)
        pixels[len(kept)] = image
        kept.append(index)

    if not kept:
        name, reason = next(iter(bad.reasons.items()), ("the data", "it is empty"))
        raise UserError(f"no image can be read. The first error: {printable(name)} ({reason}).")
    return pixels[: len(kept)], kept


def check_memory(count: int, shape: tuple[int, int, int], *, processes: int) -> None:
    """Raise UserError if the images of all local processes need over 80 % of the free memory."""
    needed, free = count * math.prod(shape) * processes, psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        raise UserError(
            f"{count:,} images in memory need {needed / 2**30:.1f} GiB for {processes} processes, "
            f"but {free / 2**30:.1f} GiB are free. Give --no_cache_images."
        )


def to_bytes(images: Tensor) -> Tensor:
    """Map pixels in [-1, 1] to 0 .. 255, uint8."""
    return ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def batches_of(pixels: Tensor, steps: Iterator[list[tuple[int, int]]]) -> Iterator[Batch]:
    """Yield a batch of images for each list of pairs (epoch, index)."""
    for step in steps:
        indices = torch.tensor([index for _, index in step])
        yield Batch(pixels[indices], indices, [])


def binary(images: Tensor, kind: str, *, generator: torch.Generator | None = None) -> Tensor:
    """Return grey images as binary images, whose values are -1 and 1.

    Args:
        images: grey values in [-1, 1].
        kind: "threshold" turns values above 0 into 1 and all others into -1. With any other kind, a
            pixel of value x becomes 1 with probability (1 + x) / 2, else -1.
        generator: generator that draws the pixels. None takes torch's global generator.
    """
    if kind == "threshold":
        return torch.where(images > 0, 1.0, -1.0)
    shares = (images + 1.0) / 2.0
    return 2.0 * torch.bernoulli(shares.clamp(0.0, 1.0), generator=generator) - 1.0


def perturbed(images: Tensor, *, rate: float) -> Tensor:
    """Return images with some values replaced, to train the background model of anomaly scores.

    The score is the ratio of an image's likelihoods under the model and under the background model
    (arXiv:1906.02845, with rates of 0.1 to 0.3). With probability `rate`, each value is replaced by
    a uniformly drawn 8-bit value. torch's global generator draws the values.

    Args:
        images: (B, C, H, W) in [-1, 1].
        rate: probability in [0, 1].
    """
    replaced = torch.rand_like(images) < rate
    levels = torch.randint(0, 256, images.shape, device=images.device) / 127.5 - 1.0
    return torch.where(replaced, levels, images)


def binary_bytes(pixels: Tensor, *, seed: int) -> Tensor:
    """Return binary images as bytes: 255 with probability (grey value) / 255, else 0.

    `pixels` are the grey images as bytes, (N, C, H, W).
    """
    generator, result = torch.Generator().manual_seed(seed), torch.empty_like(pixels)
    for part, drawn in zip(pixels.split(DRAWN_AT_ONCE), result.split(DRAWN_AT_ONCE), strict=True):
        drawn.copy_(torch.bernoulli(part.float() / 255.0, generator=generator) * 255.0)
    return result
