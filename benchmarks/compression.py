"""Measure autoencoders beside JPEG, WebP and AVIF on the same images, as `latentvae evaluate` does.

    python benchmarks/compression.py --model runs/NAME/export --data photos --out report

Writes report.json (its schema: latentvae/report/report.schema.json), per_image.csv, rate.png (rate
against PSNR and LPIPS) and sheet.png (a few images side by side), and prints the tables.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from latentvae.cli.evaluate_command import evaluate_command
from latentvae.cli.flags import exit_with, parse_options
from latentvae.errors import UserError


@dataclass(frozen=True)
class Options:
    """What to measure, on which images, and where to write it."""

    model: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Folder or Hub id of an autoencoder; give the option again for each further model."""

    data: str
    """Folder of images that the models were not trained on, or `samples`: the two photos that
    training on `samples` leaves out."""

    out: Path
    """Folder for the report; made if it is not there."""

    quick: bool = False
    """A first look: 8 images, fewer points, and none of what takes long on a CPU."""

    max_images: int | None = None
    """Measure so many images, evenly spread over the folder in the order of their names."""

    resolution: int | None = None
    """Resize the shorter side to it and crop the centre; left out, each image at its own size."""

    sheet_images: int = 4
    """How many images sheet.png shows."""

    overwrite: bool = False
    """Forget the evaluation that is in `out`."""

    device: str | None = None
    """Torch device of the models and metrics; left out, the GPU, if there is one."""


def run(options: Options) -> None:
    values = dict(vars(options))
    evaluate_command(values.pop("model"), **values)


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="compression.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
