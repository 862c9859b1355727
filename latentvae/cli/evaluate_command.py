"""`latentvae evaluate` and benchmarks/compression.py: from options to a report."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from latentvae.autoencoder import Autoencoder, load
from latentvae.data import open_source
from latentvae.errors import UserError
from latentvae.evaluation.evaluate import evaluate
from latentvae.evaluation.settings import FULL, QUICK, QUICK_IMAGES, LatentKind
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
    resolution: int | None = None,
    latent: LatentKind = "mode",
    rfid: bool = False,
    inception_weights: Path | None = None,
    allow_download: bool = False,
    sheet_images: int = 4,
    overwrite: bool = False,
    device: str | None = None,
) -> Report:
    """Measure models by their folders or Hub ids, print the tables, write the report."""
    if not models:
        raise UserError("no model to measure: give the folder or the Hub id of one or more")
    plan = replace(QUICK if quick else FULL, latent=latent, resolution=resolution)
    where = usable_device(device)
    source = open_source(data, split="validation")
    loaded = load_models(models, device=where)
    inception = None
    if inception_weights is not None or rfid:
        inception = load_inception(inception_weights, allow_download=allow_download).to(where)
    if quick and max_images is None:
        max_images = QUICK_IMAGES
    lpips = {
        net: PerceptualLoss(load_lpips(net, allow_download=allow_download))
        for net in plan.lpips_nets
    }
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
        print("stopped; the same command goes on from the last saved image", file=sys.stderr)
        raise SystemExit(130) from None  # as the shell has it for Ctrl-C
    console = Console()
    console.print(summary(report))
    text = f"report.json, per_image.csv, rate.png and sheet.png are in {out}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return report


def load_models(paths: Sequence[str], *, device: torch.device) -> dict[str, Autoencoder]:
    """By their own names, or by as much of their paths as tells them apart."""
    by_path = unique_names(paths)
    models = [load(path, device=device) for path in paths]
    by_name = [model.name for model in models]
    names = by_name if len(set(by_name)) == len(models) else by_path
    return dict(zip(names, models, strict=True))


def usable_device(device: str | None) -> torch.device:
    """None is the GPU, if there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device '{device}' cannot be used ({reason}); try 'cpu'") from error
