"""Pictures of a report: rate against quality, and reconstructions side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.data import to_tensor
from latentvae.errors import printable
from latentvae.metrics import psnr, to_8bit
from latentvae.report.codecs import CODECS, bits_per_pixel, encode_at_rate
from latentvae.report.model import raw_bits
from latentvae.report.pictures import to_picture
from latentvae.report.schema import Metric, Point, Report

PANELS: tuple[tuple[Metric, str], ...] = (
    ("psnr", "PSNR (dB), higher is better"),
    ("lpips_alex", "LPIPS (alex), lower is better"),
)
TICKS = (0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 4, 8, 16)

CROP = 320  # pixels a side of what a sheet shows of a picture, at one to one
MARGIN, CAPTION_HEIGHT = 8, 40  # pixels


def rate_figure(report: Report, path: Path) -> None:
    """Two panels over bits per pixel (log scale): every curve of real files, and models' raw rates.

    A model's star stands at the raw bits of its latent, its dashed curve at those of its files. The
    points of curves are means over the same images, as `Point.curves` has them.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    for axes, (metric, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        _draw_panel(axes, report, metric)
        axes.set(xscale="log", xlabel="bits per pixel", ylabel=label)
        axes.set_xticks([tick for tick in TICKS if _within(tick, axes.get_xlim())])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    figure.suptitle(
        f"{report.data['num_images']} images; stars: raw latent bits, dashed: coded latents"
    )
    figure.savefig(path)


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _draw_panel(axes: Axes, report: Report, metric: Metric) -> None:
    for name, points in report.codecs.items():
        axes.plot(*_curve(points, metric), marker=".", label=name)
    for name, model in report.models.items():
        mean = getattr(model.metrics, metric)
        if model.rate is None:
            continue
        label = f" {name}".replace(
            "$", r"\$"
        )  # neither hidden, as after "_", nor read as a formula
        value = mean.mean if mean is not None and math.isfinite(mean.mean) else math.nan
        color = axes.plot(model.rate.raw_bpp, value, "*", markersize=14, label=label)[0].get_color()
        if model.rate.points:
            axes.plot(*_curve(model.rate.points, metric), "--", marker=".", color=color)


def _curve(points: Sequence[Point], metric: Metric) -> tuple[list[float], list[float]]:
    found = [point.curves[metric] for point in points if metric in point.curves]
    return [point.bpp for point in found], [point.value for point in found]


def sheet_row(models: Mapping[str, Autoencoder], name: str, images: Tensor) -> list["Tile"]:
    """The original, each model, and JPEG at the nearest rate not below each model's.

    Args:
        images: (1, 3, H, W) on the 8-bit grid.
    """
    source = to_picture(images)
    caption = f"{printable(Path(name).name)}\n{source.width} x {source.height}"
    tiles, rates = [Tile(source, caption)], set()
    for label, model in models.items():
        z = model.encode(images)
        decoded: Any = model.decode(z, size=(source.height, source.width))
        recon = to_8bit(decoded)
        bpp = raw_bits(model, z) / (source.width * source.height)
        caption = f"{label}\n{bpp:.2f} bpp raw, {psnr(images, recon.to(images)).item():.1f} dB"
        tiles.append(Tile(to_picture(recon), caption))
        rates.add(bpp)
    for rate in sorted(rates):
        content, quality = encode_at_rate(CODECS["jpeg"], source, bpp=rate)
        decoded = CODECS["jpeg"].decode(content)
        decibel = psnr(images.cpu(), to_tensor(decoded)[None]).item()
        caption = f"JPEG, quality {quality}\n{bits_per_pixel(content, source):.2f} bpp, "
        tiles.append(Tile(decoded, f"{caption}{decibel:.1f} dB"))
    return tiles


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet and the one or two lines above it."""

    picture: Image.Image
    caption: str


def sheet(rows: Sequence[Sequence[Tile]], path: Path) -> None:
    """Rows of pictures, each the middle of its picture, whole pixels: cut at 320, enlarged below.

    All tiles of a row show the same part.
    """
    tiles = [[(_middle(tile.picture), tile.caption) for tile in row] for row in rows]
    width = max(sum(picture.width + MARGIN for picture, _ in row) for row in tiles) + MARGIN
    heights = [max(picture.height for picture, _ in row) + CAPTION_HEIGHT for row in tiles]
    canvas = Image.new("RGB", (width, sum(heights) + MARGIN), "white")
    draw, font, top = ImageDraw.Draw(canvas), ImageFont.load_default(size=13), 0
    for row, height in zip(tiles, heights, strict=True):
        left = MARGIN
        for picture, caption in row:
            draw.multiline_text((left, top + 4), caption, fill="black", font=font)
            canvas.paste(picture, (left, top + CAPTION_HEIGHT))
            left += picture.width + MARGIN
        top += height
    canvas.save(path)


def _middle(picture: Image.Image) -> Image.Image:
    width, height = min(picture.width, CROP), min(picture.height, CROP)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    part = picture.crop((left, top, left + width, top + height))
    factor = max(CROP // max(width, height), 1)
    return part.resize((width * factor, height * factor), Image.Resampling.NEAREST)
