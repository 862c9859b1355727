"""Compare the student's reconstructions, the teacher's reconstructions, and the images."""

from pathlib import Path

import torch
from torch import Tensor

from latentvae.data import BadImages, EvalTransform, ImageSource, some_of, validation_batches
from latentvae.distributed import gather_objects, rank, world_size
from latentvae.losses.distillation import Taught
from latentvae.losses.perceptual import PerceptualLoss
from latentvae.metrics import psnr, round_alike
from latentvae.metrics.image import to_8bit
from latentvae.models import calls
from latentvae.tasks.autoencoder.validate import difference, draw_rows, readable_images, visible
from latentvae.tasks.distill.teaching import Pair


@torch.inference_mode()
def validate(
    pair: Pair,
    source: ImageSource,
    *,
    transform: EvalTransform,
    perceptual: PerceptualLoss,
    batch_size: int,
    limit: int,
    device: torch.device,
    bad: BadImages,
) -> dict[str, float]:
    """Return mean metrics over at most `limit` evenly spread images.

    The images are divided among the ranks.

    Args:
        pair: teacher and student, in eval mode.
        source: validation images.
        transform: transform that turns images into tensors.
        perceptual: LPIPS.
        batch_size: number of images per batch of a process.
        limit: largest number of images.
        device: device of the networks.
        bad: object that collects the names of unreadable images.

    Returns:
        `validation/psnr` (dB) and `validation/lpips` compare the student's reconstructions with the
        images. With the suffix `_to_teacher`, the metrics compare the student's reconstructions
        with the teacher's reconstructions. With the suffix `_teacher`, the metrics compare the
        teacher's reconstructions with the images. `validation/images` is the number of images. If
        the encoder learns,
        `validation/latent_error` is the root mean square error between the student's and the
        teacher's latents, divided by the standard deviation of the teacher's latents.
    """
    shard = validation_batches(
        some_of(source, limit),
        transform,
        batch_size=batch_size,
        rank=rank(),
        world_size=world_size(),
        bad=bad,
    )
    sums: dict[str, float] = {}
    for batch, _ in shard:
        images = batch.to(device)
        taught = pair.teach(images, decode=True)
        values = _measures(pair, taught, perceptual) | _latent_sums(pair, taught)
        for name, value in values.items():
            # Move to the CPU first, because Apple GPUs have no float64.
            sums[name] = sums.get(name, 0.0) + value.cpu().double().sum().item()
        sums["images"] = sums.get("images", 0) + len(images)

    # means over all ranks
    ranks = gather_objects(sums)
    names = dict.fromkeys(name for part in ranks for name in part)
    total = {name: sum(part.get(name, 0.0) for part in ranks) for name in names}
    count = int(total.pop("images"))
    squares = {name: total.pop(name) for name in ("error", "z", "z2", "elements") if name in total}
    means = {f"validation/{name}": value / count for name, value in total.items()}
    if squares:
        mean = squares["z"] / squares["elements"]
        variance = squares["z2"] / squares["elements"] - mean**2
        error = squares["error"] / squares["elements"]
        means["validation/latent_error"] = (error / variance) ** 0.5
    return means | {"validation/images": count}


def _measures(pair: Pair, taught: Taught, perceptual: PerceptualLoss) -> dict[str, Tensor]:
    """Return the metrics of each image, (B,), by name."""
    assert taught.recon is not None
    images, taught_recon = taught.images, taught.recon
    recon = round_alike(pair.reconstruct(taught), images)
    pairs = {
        "": (images, recon),
        "_to_teacher": (to_8bit(taught_recon), to_8bit(recon)),
        "_teacher": (images, round_alike(taught_recon, images)),
    }
    return {
        f"{name}{suffix}": measure(*two)
        for suffix, two in pairs.items()
        for name, measure in (("psnr", psnr), ("lpips", perceptual))
    }


def _latent_sums(pair: Pair, taught: Taught) -> dict[str, Tensor]:
    """Return sums over latent elements, from which `validation/latent_error` is computed."""
    if pair.part == "decoder":
        return {}
    z = calls.encode(pair.student, taught.images)
    return {
        "error": (z - taught.z).square(),
        "z": taught.z,
        "z2": taught.z.square(),
        "elements": torch.ones_like(taught.z),
    }


@torch.inference_mode()
def save_grid(
    pair: Pair,
    source: ImageSource,
    path: Path,
    *,
    transform: EvalTransform,
    count: int,
    device: torch.device,
) -> None:
    """Write a PNG with rows for images, teacher, student, and the student's amplified error."""
    images = readable_images(source, transform, count=count).to(device)
    taught = pair.teach(images, decode=True)
    assert taught.recon is not None
    images, recon = visible(images), visible(pair.reconstruct(taught))
    rows = {"original": images, "teacher": visible(taught.recon), "student": recon}
    draw_rows(rows | difference(images, recon), path)
