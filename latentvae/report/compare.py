"""From models and an image source to a report folder: report.json, per_image.csv, two pictures."""

import csv
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from latentvae.data import ImageSource, UnreadableImage, to_tensor
from latentvae.errors import UserError
from latentvae.losses.perceptual import PerceptualLoss
from latentvae.metrics import psnr, to_8bit
from latentvae.report.codecs import CODECS, bits_per_pixel, encode_at_rate
from latentvae.report.evaluate import Evaluation, Reconstructor, Row, raw_bpp, to_picture
from latentvae.report.figures import Tile, rate_figure, sheet
from latentvae.report.schema import Report


def compare(
    models: Mapping[str, Reconstructor],
    source: ImageSource,
    out: Path,
    *,
    data_name: str,
    lpips: Mapping[str, PerceptualLoss],
    max_images: int | None = None,
    resolution: int | None = None,
    sheet_images: int = 4,
    device: torch.device | str = "cpu",
) -> Report:
    """Measure models and codecs on `source`, write the report into `out` and return it.

    Args:
        models: By the names to show.
        source: The images; unreadable ones are named on the screen, counted and left out.
        data_name: What the report calls the source.
        lpips: As for `Evaluation`.
        max_images: At most so many, evenly spread over the source.
        resolution: Pixels a side after resizing and centre crop; None keeps each image's size.
        sheet_images: How many images the sheet shows, evenly spread too.
        device: Where models and metrics run.
    """
    if sheet_images < 1:
        raise UserError(f"the sheet is to show {sheet_images} images; at least 1 is needed")
    console = Console(stderr=True)
    evaluation = Evaluation(models, lpips=lpips, resolution=resolution, device=device)
    pictures = _Pictures(source, spread(len(source), max_images), console)
    _make_folder(out)
    with (out / "per_image.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for name, picture in track(pictures, "measuring", total=len(pictures), console=console):
            writer.writerows(row.to_dict() for row in evaluation.update(name, picture))
    report = evaluation.report(data={"source": data_name, **pictures.describe()})
    report.write(out / "report.json")
    rate_figure(report, out / "rate.png")
    shown = [pictures.read[i] for i in spread(len(pictures.read), sheet_images)]
    chosen = _Pictures(source, shown, console)
    sheet([_sheet_row(evaluation, name, picture) for name, picture in chosen], out / "sheet.png")
    return report


def spread(total: int, at_most: int | None) -> list[int]:
    """Up to `at_most` of the numbers below `total`, evenly spaced, from 0."""
    if at_most is None or at_most >= total:
        return list(range(total))
    if at_most < 1:
        raise UserError(f"the number of images is {at_most}; at least 1 is needed")
    return [i * total // at_most for i in range(at_most)]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell all of them apart (`a/export`, `b/export`)."""
    parts = [path.absolute().parts for path in paths]
    if twice := [str(path) for path, n in Counter(paths).items() if n > 1]:
        raise UserError(f"the model '{twice[0]}' is given twice")
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"two of the models are one folder: {', '.join(map(str, paths))}")


@dataclass
class _Pictures:
    """Some pictures of a source, in order; remembers which could be read."""

    source: ImageSource
    indices: list[int]
    console: Console
    read: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        for index in self.indices:
            name = self.source.name(index)
            try:
                picture = self.source.read(index)
            except UnreadableImage as error:
                self.unreadable.append(name)
                self.console.print(f"left out: {error}", markup=False)
                continue
            self.read.append(index)
            yield name, picture

    def describe(self) -> dict[str, object]:
        names = "\n".join(self.source.name(index) for index in self.read)
        return {
            "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
            "unreadable": self.unreadable,
        }


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{path}': {error.strerror}") from error


def _sheet_row(evaluation: Evaluation, name: str, picture: Image.Image) -> list[Tile]:
    """The original, each model, and JPEG at the nearest rate not below each model's."""
    images = evaluation.prepare(picture)
    source = to_picture(images)
    tiles, rates = [Tile(source, f"{Path(name).name}\n{source.width} x {source.height}")], set()
    for label, model in evaluation.models.items():
        recon, bpp = to_8bit(model.reconstruct(images)), raw_bpp(model, *images.shape[2:])
        caption = f"{label}\n{bpp:.2f} bpp raw, {psnr(images, recon).item():.1f} dB"
        tiles.append(Tile(to_picture(recon), caption))
        rates.add(bpp)
    for rate in sorted(rates):
        content, quality = encode_at_rate(CODECS["jpeg"], source, bpp=rate)
        decoded = CODECS["jpeg"].decode(content)
        decibel = psnr(images.cpu(), to_tensor(decoded)[None]).item()
        caption = f"JPEG, quality {quality}\n{bits_per_pixel(content, source):.2f} bpp, "
        tiles.append(Tile(decoded, f"{caption}{decibel:.1f} dB"))
    return tiles
