"""Validate on unaugmented images: PSNR, SSIM and LPIPS, and a picture of reconstructions."""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from latentvae.data import (
    BadImages,
    EvalTransform,
    ImageSource,
    UnreadableImage,
    some_of,
    spread,
    validation_batches,
)
from latentvae.distributed import gather_objects, rank, world_size
from latentvae.errors import UserError
from latentvae.losses.colors import to_rgb
from latentvae.metrics import psnr, round_alike, ssim
from latentvae.metrics.tokens import TokenUsage
from latentvae.models import Network, calls
from latentvae.pictures import to_pil

DIFFERENCE_GAIN = 4.0  # factor by which differences are multiplied in the picture
GRID_SIDE = 128  # smallest side of a picture in the grid, in pixels
LABEL_WIDTH = 120  # width of the labels left of the pictures, in pixels


@torch.inference_mode()
def validate(
    net: Network,
    source: ImageSource,
    *,
    transform: EvalTransform,
    perceptual: nn.Module,
    batch_size: int,
    limit: int,
    device: torch.device,
    bad: BadImages,
) -> dict[str, float]:
    """Return mean metrics over at most `limit` images, evenly spread over the source.

    Exactly one rank measures each image. Images are reconstructed from the posterior's mode, or
    from a tokenizer's codes.
    Reconstructions are rounded to 8 bits if the image has 8 bits (`metrics.round_alike`).

    Args:
        net: the network in eval mode.
        source: validation images.
        transform: transform that turns images into tensors.
        perceptual: LPIPS.
        batch_size: number of images per batch of a process.
        limit: largest number of images.
        device: device that computes the metrics.
        bad: object that collects the names of unreadable images.

    Returns:
        `validation/psnr` (dB, mean of per-image values), `validation/ssim`, `validation/lpips` and
        `validation/images` (number of images). A tokenizer also has `validation/usage` (share of
        the codes that are used), `validation/perplexity`, `validation/entropy_bits` (per token) and
        `validation/tokens` (number of tokens of all images). The number of used codes is at most
        the number of tokens. A tokenizer can have several levels (token maps). If each level has
        its own codebook, then usage, perplexity and entropy are means over the levels, and
        `validation/tokens` counts the tokens of the first level. In this case, the values of the
        first level are also given: `validation/usage_level0`, `validation/perplexity_level0` and
        `validation/tokens_level0`. The names for the next levels end in `_level1` and so on.
    """
    # what to measure
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "psnr": psnr,
        "ssim": ssim,
        "lpips": perceptual,
    }
    sums, count = dict.fromkeys(measures, 0.0), 0
    codes = calls.codes(net)
    usage = None if codes is None else TokenUsage(codes.number, codebooks=codes.codebooks)

    # this rank's images
    shard = validation_batches(
        some_of(source, limit),
        transform,
        batch_size=batch_size,
        rank=rank(),
        world_size=world_size(),
        bad=bad,
    )
    for images, _ in shard:
        images = images.to(device)
        z = calls.encode(net, images)
        if codes is None or usage is None:
            recon = calls.decode(net, z)
        else:
            indices = calls.tokenize(net, z)
            usage.update(codes.by_codebook(indices))
            recon = calls.decode_indices(net, indices)
        recon = round_alike(recon.clamp(-1.0, 1.0), images)

        count += len(images)
        for name, measure in measures.items():
            # Move to the CPU first, because Apple GPUs have no float64.
            sums[name] += measure(images, recon).cpu().double().sum().item()

    # means over all ranks
    ranks = gather_objects((sums, count))
    total = sum(counted for _, counted in ranks)
    means = {
        f"validation/{name}": sum(part[name] for part, _ in ranks) / total for name in measures
    }
    if usage is not None:
        means |= _token_measures(usage)
    return means | {"validation/images": total}


def _token_measures(usage: TokenUsage) -> dict[str, float]:
    """Return how the images of all ranks use the codes, as a dict of metrics."""
    joined = TokenUsage.joined(gather_objects(usage.state_dict())).result()
    levels = joined.get("levels", [])
    names: tuple[Literal["usage", "perplexity", "entropy_bits"], ...]
    names = ("usage", "perplexity", "entropy_bits")
    measured: dict[str, float] = {f"validation/{name}": joined[name] for name in names}
    for number, level in enumerate(levels):
        measured |= {
            f"validation/usage_level{number}": level["usage"],
            f"validation/perplexity_level{number}": level["perplexity"],
            f"validation/tokens_level{number}": level["tokens"],
        }
    tokens = levels[0]["tokens"] if levels else joined["tokens"]
    return measured | {"validation/tokens": tokens}  # tokens of one codebook


def readable_images(source: ImageSource, transform: EvalTransform, *, count: int) -> Tensor:
    """Return at most `count` images, evenly spread over the source, (n, C, H, W) in [-1, 1].

    Other images replace images that cannot be read.

    Raises:
        UserError: no image can be read.
    """
    images: list[Tensor] = []
    reasons: list[str] = []
    chosen = spread(len(source), count)
    others = (i for i in range(len(source)) if i not in chosen)
    for i in itertools.chain(chosen, others):
        if len(images) == count:
            break
        try:
            images.append(transform(source.read(i)))
        except UnreadableImage as error:
            reasons.append(f"'{source.name(i)}': {error.reason}")

    if not images:
        raise UserError(
            f"none of the {len(source):,} validation images can be read. The first error is "
            f"{reasons[0]}"
        )
    return torch.stack(images)


def reconstruct_mode(net: Network, images: Tensor) -> Tensor:
    """Reconstruct images (B, C, H, W) in [-1, 1] from the posterior's mode or the codes."""
    return calls.decode(net, calls.encode(net, images)).clamp(-1.0, 1.0)


def validation_line(values: Mapping[str, float]) -> str:
    """Return the line that is printed after a validation."""
    codes = ""
    if "validation/usage" in values:
        codes = (
            f"{values['validation/usage']:.1%} of the codes used by "
            f"{values['validation/tokens']:,} tokens, perplexity "
            f"{values['validation/perplexity']:.0f}, "
        )
    return (
        f"PSNR {values['validation/psnr']:.2f} dB, "
        f"SSIM {values['validation/ssim']:.3f}, LPIPS {values['validation/lpips']:.3f}, "
        f"{codes}on {values['validation/images']:,} unseen images"
    )


@torch.inference_mode()
def save_grid(
    net: Network,
    source: ImageSource,
    path: Path,
    *,
    transform: EvalTransform,
    count: int,
    device: torch.device,
) -> None:
    """Write a PNG with labelled rows (original, reconstruction, difference), one column per image.

    In the row of differences, mid-grey means no difference. Images with alpha are composited over
    mid-grey. Small images are enlarged by an integer factor.
    """
    images = readable_images(source, transform, count=count).to(device)
    images, recon = visible(images), visible(reconstruct_mode(net, images))
    draw_rows({"original": images, "reconstruction": recon, **difference(images, recon)}, path)


def difference(images: Tensor, recon: Tensor) -> dict[str, Tensor]:
    """Return a dict from a label to the amplified difference of two batches of images.

    In the result, mid-grey means no difference.
    """
    enlarged = (DIFFERENCE_GAIN / 2 * (recon - images)).clamp(-1.0, 1.0)
    return {f"{DIFFERENCE_GAIN:g} x difference": enlarged}


def draw_rows(rows: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG with a labelled row for each batch of images (count, C, H, W) in [-1, 1]."""
    wide = [torch.cat(list(row), dim=2) for row in rows.values()]  # each (C, H, count * W)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = to_pil(torch.cat(wide, dim=1)[None])[0]
    factor = grid_factor(next(iter(rows.values())))
    _labelled(picture, list(rows), factor=factor).save(path)


def grid_factor(images: Tensor) -> int:
    """Return the factor by which images (B, C, H, W) are enlarged in a grid."""
    return math.ceil(GRID_SIDE / min(images.shape[2:]))


def _labelled(picture: Image.Image, labels: list[str], *, factor: int) -> Image.Image:
    """Return an enlarged picture with a label left of each of its rows."""
    width, height = factor * picture.width, factor * picture.height
    canvas = Image.new(picture.mode, (LABEL_WIDTH + width, height), "white")
    canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (LABEL_WIDTH, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for i, label in enumerate(labels):
        draw.text((6, i * height // len(labels) + 6), label, fill="black", font=font)
    return canvas


def visible(images: Tensor) -> Tensor:
    """Return images for display: RGBA is composited over mid-grey, and grey keeps one channel."""
    return to_rgb(images) if images.shape[1] == 4 else images
