"""A report as tables on the screen."""

from collections.abc import Sequence

from rich.table import Table

from latentvae.report.schema import Mean, Point, Report

HEADINGS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "lpips_alex": "LPIPS alex",
    "lpips_vgg": "LPIPS vgg",
}
ABSENT = "n/a"


def models_table(report: Report) -> Table:
    """One line a model: raw rate, and the mean of each metric with half its interval's width."""
    title = f"Models, {report.data['num_images']} images ({report.protocol['size']})"
    table = Table("model", "raw bpp", title=title, title_justify="left")
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right")
    for name, model in report.models.items():
        cells = [_cell(getattr(model.metrics, m), digits=_digits(m)) for m in HEADINGS]
        table.add_row(name, f"{model.rate.raw_bpp:.3f}", *cells)
    return table


def codecs_table(report: Report) -> Table:
    """The codecs beside each model: of each codec, the point nearest in rate that is not below."""
    title = "Codecs at the nearest rate not below each model's, else at their highest"
    table = Table("beside", "codec", "quality", "bpp", title=title, title_justify="left")
    for heading in ("PSNR (dB)", "LPIPS alex"):
        table.add_column(heading, justify="right")
    for name, model in report.models.items():
        for codec, points in report.codecs.items():
            point = point_at_rate(points, model.rate.raw_bpp)
            lpips = ABSENT if point.lpips_alex is None else f"{point.lpips_alex:.4f}"
            row = (name, codec, str(point.quality), f"{point.bpp:.3f}", f"{point.psnr:.2f}", lpips)
            table.add_row(*row)
    return table


def point_at_rate(points: Sequence[Point], bpp: float) -> Point:
    """The cheapest point of at least `bpp`; the dearest if none reaches it."""
    enough = [point for point in points if point.bpp >= bpp]
    if not enough:
        return max(points, key=lambda point: point.bpp)
    return min(enough, key=lambda point: point.bpp)


def _digits(metric: str) -> int:
    return 2 if metric == "psnr" else 4


def _cell(mean: Mean | None, *, digits: int) -> str:
    if mean is None:
        return ABSENT
    half = (mean.ci95[1] - mean.ci95[0]) / 2
    return f"{mean.mean:.{digits}f} \u00b1{half:.{digits}f}"
