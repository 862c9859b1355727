"""Draw the figure of a report: quality against rate."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from latentvae.report.schema import Metric, Point, Report

PANELS: tuple[tuple[Metric, str], ...] = (
    ("psnr", "PSNR (dB), higher is better"),
    ("lpips_alex", "LPIPS (alex), lower is better"),
)
TICKS = (0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 4, 8, 16)


def rate_figure(report: Report, path: Path) -> None:
    """Draw PSNR and LPIPS against bits per pixel (log scale), with one panel for each metric.

    A star shows a model at the raw rate of its latent, without entropy coding. A dashed curve shows
    a model at the sizes of its encoded files. A solid curve shows a codec at the sizes of its
    files. All points of a panel are means over the same images (`Point.curves`), except the stars
    and the curves of codecs that cannot store all images.
    """
    # panels
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    for axes, (metric, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        _draw_panel(axes, report, metric)
        axes.set(xscale="log", xlabel="bits per pixel", ylabel=label)
        axes.set_xticks([tick for tick in TICKS if _within(tick, axes.get_xlim())])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)

    # legend and title
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
        # matplotlib hides labels that start with "_" and reads "$" as a formula.
        label = f" {name}".replace("$", r"\$")
        value = mean.mean if mean is not None and math.isfinite(mean.mean) else math.nan
        color = axes.plot(model.rate.raw_bpp, value, "*", markersize=14, label=label)[0].get_color()
        if model.rate.points:
            axes.plot(*_curve(model.rate.points, metric), "--", marker=".", color=color)


def _curve(points: Sequence[Point], metric: Metric) -> tuple[list[float], list[float]]:
    found = [point.curves[metric] for point in points if metric in point.curves]
    return [point.bpp for point in found], [point.value for point in found]
