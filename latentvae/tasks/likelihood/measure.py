"""Measure the likelihood of images under an exported network (`latentvae likelihood`)."""

import json as json_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from latentvae.compute.precision import full_float32
from latentvae.data import (
    BadImages,
    Batch,
    EvalTransform,
    PixelFormat,
    open_source,
    some_of,
    spread,
)
from latentvae.distributed import launched_device
from latentvae.errors import UserError, printable
from latentvae.evaluation.likelihood import Sums, bits_per_dim, bounds_of
from latentvae.evaluation.published import PUBLISHED, Published
from latentvae.metrics.mutual_information import mutual_information
from latentvae.models.likelihood_models import ImagesOfModel, load_likelihood_net
from latentvae.tasks.likelihood.images import binary_bytes, read_all

SHOWN_GROUPS = 12
MAX_POSTERIORS = 2000  # largest number of images for the mutual information (quadratic time)


@full_float32()
def measure_folder(
    model: Path,
    data: str,
    *,
    samples: int,
    max_images: int | None = None,
    batch_size: int = 20,
    binarize: str | None = None,
    seed: int = 0,
    json: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure the likelihood of images, print the results, and write the results as JSON.

    Args:
        model: folder of an exported network or of a finished run.
        data: images, in any form that `open_source` reads.
        samples: number of latent samples per image.
        max_images: largest number of images to measure.
        batch_size: number of images that are computed at once.
        binarize: how to make images binary, "static" or "threshold". None takes the value
            that is stored with the network.
        seed: seed of the latent samples and of the random binary pixels.
        json: file for the results. None writes no file.
        device: device of the computation. None takes the GPU if there is one.

    Returns:
        The results, as the JSON file holds them.

    Raises:
        UserError: an option is wrong, or the model or the images cannot be read.
    """
    # checks
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1 (got {value}).")
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images must be at least 1 (got {max_images}).")
    device = device or launched_device()
    net, about = load_likelihood_net(model)
    net.to(device)  # type: ignore[attr-defined]
    if binarize is not None and about.binarize == "none":
        raise UserError(
            f"--binarize {binarize} is for networks of binary images, but '{model}' is a "
            "network of grey or colour images. Leave it out."
        )

    # bounds
    pixels, resized = _read(data, net.image_shape, about, max_images=max_images)
    kind = binarize or about.binarize
    pixels = _made_binary(pixels, kind, seed=seed)
    total, posteriors = Sums(), list[tuple[torch.Tensor, torch.Tensor]]()
    with torch.random.fork_rng(), tqdm(total=len(pixels), unit="images", disable=None) as bar:
        torch.manual_seed(seed)
        for part in pixels.split(batch_size):
            images = Batch(part, torch.empty(0), []).on(device)
            total.add(bounds_of(net, images, samples=samples))
            if (moments := net.posterior_moments(images)) is not None:
                posteriors.append(moments)
            bar.update(len(part))

    # results
    result = _summary(total, net.image_shape, samples=samples)
    result["protocol"] = {"binarize": kind, "seed": seed, "resized_from": resized}
    if posteriors:
        result["mutual_information"] = _information(posteriors, seed=seed)
    paper = PUBLISHED.get(about.preset) if resized is None else None
    print(_lines(result, paper))
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_module.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _read(
    data: str, shape: tuple[int, int, int], about: ImagesOfModel, *, max_images: int | None
) -> tuple[torch.Tensor, str | None]:
    """Return the images as bytes, and the first image's original size if it was resized."""
    channels, height, width = shape
    source = open_source(data, pixels=PixelFormat(channels, about.value_range))
    if max_images is not None:
        source = some_of(source, max_images)
    bad = BadImages()
    transform = EvalTransform((height, width), interpolation=about.image_interpolation_mode)
    pixels, kept = read_all(source, transform, bad=bad, progress="reading images")
    for name, reason in bad.reasons.items():
        print(f"leaving out {printable(name)}: {printable(reason)}")
    across, down = source.read(kept[0]).size
    return pixels, None if (down, across) == (height, width) else f"{down} x {across}"


def _made_binary(pixels: torch.Tensor, kind: str, *, seed: int) -> torch.Tensor:
    if kind == "none":
        return pixels
    if kind == "static":
        return binary_bytes(pixels, seed=seed)
    return (pixels > 127).to(torch.uint8) * 255


def _summary(total: Sums, shape: tuple[int, int, int], *, samples: int) -> dict[str, Any]:
    each = torch.cat(total.each, dim=1)  # (2, N)
    error = each.std(dim=1, correction=0) / total.images**0.5
    elbo, importance = -total.elbo / total.images, -total.importance / total.images
    return {
        "images": total.images,
        "samples": samples,
        "nats_per_image": {"elbo": elbo, "importance": importance},
        "standard_error": {"elbo": error[0].item(), "importance": error[1].item()},
        "bits_per_dim": bits_per_dim(elbo, shape),
        "bits_per_dim_importance": bits_per_dim(importance, shape),
        "kl_per_group": (torch.as_tensor(total.kl) / total.images).tolist(),
        "active_units": total.active_units(),
        "units": None if (activity := total.activity()) is None else len(activity),
    }


def _information(posteriors: list[tuple[torch.Tensor, torch.Tensor]], *, seed: int) -> float:
    """Return the mutual information of images and latents, in nats."""
    means, logvars = (torch.cat(parts).cpu() for parts in zip(*posteriors, strict=True))
    chosen = spread(len(means), min(len(means), MAX_POSTERIORS))
    means, logvars = means[chosen], logvars[chosen]
    return mutual_information(means, logvars, generator=torch.Generator().manual_seed(seed))


def _lines(result: dict[str, Any], paper: Published | None) -> str:
    nats, error, groups = (
        result["nats_per_image"],
        result["standard_error"],
        result["kl_per_group"],
    )
    shown = ", ".join(f"{value:.2f}" for value in groups[:SHOWN_GROUPS])
    more = f" and {len(groups) - SHOWN_GROUPS} more" if len(groups) > SHOWN_GROUPS else ""
    lines = [
        f"{result['images']:,} images, {result['samples']:,} samples each",
        f"  ELBO                 {nats['elbo']:.2f} ± {error['elbo']:.2f} nats per image, "
        f"{result['bits_per_dim']:.4f} bits per dimension",
        f"  importance-weighted  {nats['importance']:.2f} ± {error['importance']:.2f} nats per "
        f"image, {result['bits_per_dim_importance']:.4f} bits per dimension",
        f"  KL per group         {shown}{more} nats",
    ]

    if result["active_units"] is not None:
        lines.append(f"  active units         {result['active_units']:,} of {result['units']:,}")
    if (shared := result.get("mutual_information")) is not None:
        lines.append(f"  mutual information   {shared:.2f} nats between images and latents")
    if (size := result["protocol"]["resized_from"]) is not None:
        lines.append(f"  note                 images were resized (the first image from {size})")
    if paper is not None:
        unit = "nats per image" if paper.unit == "nats" else "bits per dimension"
        lines.append(f"  published            {paper.value:.2f} {unit} ({paper.source})")
    return "\n".join(lines)
