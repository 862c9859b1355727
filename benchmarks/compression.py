"""Measure autoencoders beside JPEG and WebP on the same images.

    python benchmarks/compression.py --model runs/NAME/export --data photos --out report

Writes report.json (its schema: latentvae/report/schema.py), per_image.csv, rate.png (rate against
PSNR and LPIPS) and sheet.png (a few images side by side), and prints the tables.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from latentvae.data import open_source
from latentvae.errors import UserError
from latentvae.flags import exit_with, parse_options
from latentvae.loading import load
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.report import Reconstructor, compare, unique_names
from latentvae.report.tables import codecs_table, models_table


@dataclass(frozen=True)
class Options:
    """What to measure, on which images, and where to write it."""

    model: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """Folder of an exported autoencoder; give the option again for each further model."""

    data: str
    """Folder of images, or `samples`: the photos that come with scikit-image."""

    out: Path
    """Folder for the report; made if it is not there."""

    max_images: int | None = None
    """Measure so many images, evenly spread over the folder in the order of their names."""

    resolution: int | None = None
    """Resize the shorter side to it and crop the centre; left out, each image at its own size."""

    sheet_images: int = 4
    """How many images sheet.png shows."""

    lpips_vgg: bool = True
    """Measure LPIPS on VGG too, which is much of the time on a CPU."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Torch device of the models and metrics."""


def run(options: Options) -> None:
    if not options.model:
        raise UserError("no model to measure: give one or more --model FOLDER")
    source = open_source(options.data, split="validation")
    models = load_models(options.model, device=_usable(options.device))
    nets = ("alex", "vgg") if options.lpips_vgg else ("alex",)
    report = compare(
        models,
        source,
        options.out,
        data_name=options.data,
        lpips={net: PerceptualLoss(load_lpips(net)) for net in nets},
        max_images=options.max_images,
        resolution=options.resolution,
        sheet_images=options.sheet_images,
        device=options.device,
    )
    console = Console()
    console.print(models_table(report), codecs_table(report))
    console.print(f"report.json, per_image.csv, rate.png and sheet.png are in {options.out}")


def load_models(paths: Sequence[Path], *, device: torch.device) -> dict[str, Reconstructor]:
    """By their own names, or by as much of their paths as tells them apart."""
    by_path = unique_names(paths)
    models = [load(path, device=device) for path in paths]
    by_name = [model.name for model in models]
    names = by_name if len(set(by_name)) == len(models) else by_path
    return dict(zip(names, models, strict=True))


def _usable(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device '{device}' cannot be used ({reason}); try 'cpu'") from error


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="compression.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
