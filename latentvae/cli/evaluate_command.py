"""Run an evaluation with the options of `latentvae evaluate` or benchmarks/compression.py."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from latentvae.autoencoder import Autoencoder, load
from latentvae.compute.optimization import Optimize
from latentvae.data import EIGHT_BIT, open_source, set_pixel_limit
from latentvae.errors import UserError, first_line
from latentvae.evaluation.evaluate import evaluate
from latentvae.evaluation.settings import FULL, QUICK, QUICK_IMAGES, SECTIONS, LatentKind
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.metrics.inception import load_inception
from latentvae.report.names import unique_names
from latentvae.report.schema import Report
from latentvae.report.tables import summary


def evaluate_command(
    models: Sequence[str],
    *,
    data: str,
    out: Path,
    quick: bool = False,
    max_images: int | None = None,
    resolution: int | Sequence[int] | None = None,
    aspect_ratio_buckets: int = 0,
    sections: Sequence[str] = SECTIONS,
    ignore_icc: bool = False,
    max_pixels: int | None = None,
    all_pages: bool = False,
    latent: LatentKind = "mode",
    rfid: bool = False,
    inception_weights: Path | None = None,
    allow_download: bool = False,
    sheet_images: int = 4,
    overwrite: bool = False,
    device: str | None = None,
    variant: str | None = None,
) -> Report:
    """Measure models, print the tables, write and return the report.

    Args:
        models: folders or Hub ids of autoencoders.
        data: images in any form that `open_source` takes, such as a folder, or `samples` (two
            photos that come with scikit-image).
        out: folder for the report.
        quick: make a short evaluation with the settings of `evaluation.settings.QUICK`.
        max_images: measure at most this many images. With None, all images are measured, or
            `QUICK_IMAGES` images if `quick` is set.
        resolution: resize images to cover a square of this side, or this height and width, and crop
            the centre. With None, each image keeps its own size.
        max_pixels: largest number of pixels of an image that is read, see `data.set_pixel_limit`.
        latent: whether to decode the posterior's mode or a sample of the posterior.
        rfid: measure rFID and KID, with the Inception network.
        inception_weights: file with the Inception weights for rFID and KID. With this file, rFID
            and KID are measured.
        allow_download: download weights that this machine does not have.
        sheet_images: number of images in sheet.png.
        overwrite: replace an existing evaluation in `out`.
        device: torch device. With None, the GPU is used if there is one.

    Raises:
        UserError: no model is given, or a path, device or option cannot be used.
    """
    if not models:
        raise UserError(
            "there is no model to measure. Give the folder or the Hub id of at least one model."
        )

    # Check options and images before the weights are read.
    plan = replace(
        QUICK if quick else FULL,
        latent=latent,
        resolution=_size(resolution),
        buckets=aspect_ratio_buckets,
        ignore_icc=ignore_icc,
    ).only(sections)
    where = usable_device(device)
    set_pixel_limit(max_pixels)
    pixels = replace(EIGHT_BIT, ignore_icc=ignore_icc, all_pages=all_pages)
    source = open_source(data, split="validation", pixels=pixels)
    if quick and max_images is None:
        max_images = QUICK_IMAGES

    # On a CPU, the pictures are computed faster, with the same numbers up to rounding. Speed,
    # memory, half precision and tiles are those of the unchanged network.
    optimize: Optimize | None = "exact" if where.type == "cpu" else None

    # models and the networks of the metrics
    loaded = load_models(models, device=where, variant=variant, optimize=optimize)
    inception = None
    if inception_weights is not None or rfid:
        inception = load_inception(inception_weights, allow_download=allow_download).to(where)
    lpips = {
        net: PerceptualLoss(load_lpips(net, allow_download=allow_download))
        for net in plan.lpips_nets
    }

    # measurement
    try:
        report = evaluate(
            loaded,
            source,
            out,
            data_name=data,
            lpips=lpips,
            inception=inception,
            plan=plan,
            max_images=max_images,
            sheet_images=sheet_images,
            overwrite=overwrite,
            device=where,
        )
    except KeyboardInterrupt:
        text = "stopped. Run the same command again to continue from the last saved image."
        print(text, file=sys.stderr)
        raise SystemExit(130) from None  # the shell's code for Ctrl-C

    console = Console()
    console.print(summary(report))
    written = ("report.json", "per_image.csv", "rate.png", "sheet.png")
    there = [name for name in written if (out / name).exists()]
    text = f"{', '.join(there)}: in {out}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return report


def _size(resolution: int | Sequence[int] | None) -> int | tuple[int, int] | None:
    """Return the resolution as one number (the side of a square), or as height and width."""
    if resolution is None or isinstance(resolution, int):
        return resolution
    if len(resolution) not in (1, 2):
        given = " ".join(map(str, resolution))
        raise UserError(f"resolution must be one number, or height and width (got {given!r}).")
    return resolution[0] if len(resolution) == 1 else (resolution[0], resolution[1])


def load_models(
    paths: Sequence[str],
    *,
    device: torch.device,
    variant: str | None = None,
    optimize: Optimize | None = None,
) -> dict[str, Autoencoder]:
    """Return the loaded models by name.

    If two models have the same name, each model is named by the last parts of its path.
    """
    by_path = unique_names(paths)
    models = [load(path, device=device, variant=variant, optimize=optimize) for path in paths]
    by_name = [model.name for model in models]
    names = by_name if len(set(by_name)) == len(models) else by_path
    return dict(zip(names, models, strict=True))


def usable_device(device: str | None) -> torch.device:
    """Return a torch device that works on this machine.

    With None, return the GPU if there is one, else the CPU.

    Raises:
        UserError: the device does not exist or does not work.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"device '{device}' cannot be used ({reason}). Try 'cpu'.") from error
