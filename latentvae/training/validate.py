"""Validation: PSNR, SSIM and LPIPS of the averaged weights on whole, unaugmented images, and a grid
to look at."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from latentvae.data import (
    BadImages,
    EvalTransform,
    ImageSource,
    UnreadableImage,
    validation_batches,
)
from latentvae.distributed import gather_objects, rank, world_size
from latentvae.errors import UserError
from latentvae.metrics import psnr, ssim, to_8bit
from latentvae.metrics.latent import TokenUsage
from latentvae.models import calls

DIFFERENCE_GAIN = 4.0  # the grid shows differences this many times as large


class First:
    """The first images of a source."""

    def __init__(self, source: ImageSource, limit: int) -> None:
        self.source = source
        self.limit = limit

    def __len__(self) -> int:
        return min(self.limit, len(self.source))

    def name(self, index: int, /) -> str:
        return self.source.name(index)

    def read(self, index: int, /, *, at_least: int | None = None) -> Image.Image:
        return self.source.read(index, at_least=at_least)


@torch.inference_mode()
def validate(
    net: Any,
    source: ImageSource,
    *,
    transform: EvalTransform,
    perceptual: nn.Module,
    batch_size: int,
    limit: int,
    device: torch.device,
    bad: BadImages,
) -> dict[str, float]:
    """Means over the first ``limit`` images, each measured once over all ranks, at the posterior's
    mode after rounding to 8 bits.

    Returns:
        `validation/psnr` (dB, mean of per-image values), `validation/ssim`, `validation/lpips`,
        `validation/images`; of a tokenizer `validation/usage` (share of the codes),
        `validation/perplexity` and `validation/entropy_bits` (per token) over the whole set.
    """
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "psnr": psnr,
        "ssim": ssim,
        "lpips": perceptual,
    }
    sums, count = dict.fromkeys(measures, 0.0), 0
    num_codes = calls.num_codes(net)
    usage = None if num_codes is None else TokenUsage(num_codes)
    shard = validation_batches(
        First(source, limit),
        transform,
        batch_size=batch_size,
        rank=rank(),
        world_size=world_size(),
        bad=bad,
    )
    for images, _ in shard:
        images = images.to(device)
        z = calls.encode(net, images)
        if usage is not None:
            usage.update(calls.tokenize(net, z))
        recon = to_8bit(calls.decode(net, z).clamp(-1.0, 1.0))
        count += len(images)
        for name, measure in measures.items():
            sums[name] += measure(images, recon).double().cpu().sum().item()
    ranks = gather_objects((sums, count))
    total = sum(counted for _, counted in ranks)
    means = {
        f"validation/{name}": sum(part[name] for part, _ in ranks) / total for name in measures
    }
    if usage is not None:
        means |= _token_measures(usage)
    return means | {"validation/images": total}


def _token_measures(usage: TokenUsage) -> dict[str, float]:
    """Over the images of all ranks."""
    joined = TokenUsage.joined(gather_objects(usage.state_dict()))
    names: tuple[Literal["usage", "perplexity", "entropy_bits"], ...]
    names = ("usage", "perplexity", "entropy_bits")
    return {f"validation/{name}": joined.result()[name] for name in names}


def first_readable(source: ImageSource, transform: EvalTransform, *, count: int) -> Tensor:
    """The first ``count`` images that can be read, (count or fewer, 3, R, R).

    Raises:
        UserError: there is none.
    """
    images: list[Tensor] = []
    for i in range(len(source)):
        if len(images) == count:
            break
        with contextlib.suppress(UnreadableImage):
            images.append(transform(source.read(i)))
    if not images:
        raise UserError(f"not one of the {len(source):,} validation images can be read")
    return torch.stack(images)


def reconstruct_mode(net: Any, images: Tensor) -> Tensor:
    """Decode the posterior's mode, or the codes; (B, C, H, W) to the same, clamped to [-1, 1]."""
    return calls.decode(net, calls.encode(net, images)).clamp(-1.0, 1.0)


def sample_grid_path(folder: Path, update: int) -> Path:
    """Where a run keeps the sample grid of an update."""
    return folder / "samples" / f"update-{update:06d}.png"


@torch.inference_mode()
def save_grid(
    net: Any,
    source: ImageSource,
    path: Path,
    *,
    transform: EvalTransform,
    count: int,
    device: torch.device,
) -> None:
    """Write a PNG with a column per image: original, reconstruction, difference (mid-grey is
    none)."""
    images = first_readable(source, transform, count=count).to(device)
    recon = reconstruct_mode(net, images)
    difference = (DIFFERENCE_GAIN / 2 * (recon - images)).clamp(-1.0, 1.0)
    rows = [
        torch.cat(list(row), dim=2) for row in (images, recon, difference)
    ]  # each (3, R, count * R)
    pixels = ((torch.cat(rows, dim=1) + 1.0) * 127.5).round().to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path)
