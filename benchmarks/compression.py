"""Compare autoencoders with JPEG, WebP and AVIF on the same images, as `latentvae evaluate` does.

    python benchmarks/compression.py --model runs/NAME/export --data photos --out report

The script prints tables and writes report.json, per_image.csv, rate.png (rate against PSNR and
LPIPS) and sheet.png (original and decoded images side by side). The JSON Schema of the report is
latentvae/report/report.schema.json.
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
    """What to measure, on which images, and where to write the results."""

    model: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Folder or Hub id of an autoencoder. To measure several autoencoders, give this option several
    times."""

    data: str
    """Folder of images that the models were not trained on. `samples` means two photos from
    scikit-image, which `latentvae train --train_data_dir samples` does not train on."""

    out: Path
    """Folder for the report. The folder is created if it does not exist."""

    quick: bool = False
    """Make a short evaluation: only 8 images, fewer points on the rate-distortion curves, and no
    measurements that are slow on a CPU."""

    max_images: int | None = None
    """Largest number of images to measure. If there are more images, this many are chosen at equal
    distances in the sorted list of names. Default: all images."""

    resolution: int | None = None
    """Resize the shorter side of each image to this many pixels and crop the centre. Default: each
    image keeps its own size."""

    sheet_images: int = 4
    """Number of images that sheet.png shows, each with its reconstructions beside it."""

    overwrite: bool = False
    """Delete the earlier evaluation in the folder `out`, and start again."""

    device: str | None = None
    """Torch device of the models and metrics. Default: the GPU if there is one, else the CPU."""


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
