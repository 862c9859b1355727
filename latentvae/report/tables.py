"""Show a report as tables on the screen."""

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from latentvae.report.schema import IMAGE_COLUMNS, Mean, ModelReport, Point, Report

DISTANCES = ("rfid", "kid", "fd_vgg", "kd_vgg")
ABSENT = "n/a"


def summary(report: Report) -> Group:
    """Return all tables, and one line for each warning."""
    measured = any(model.rate for model in report.models.values())
    tables: list[Table | Text] = [models_table(report)] if measured else []
    if any(model.codecs_at_rate for model in report.models.values()):
        tables.append(codecs_table(report))
    if any(model.rate and model.rate.points for model in report.models.values()):
        tables.append(bits_table(report))
    if any(model.passport or model.speed for model in report.models.values()):
        tables.append(passport_table(report))
    for name, model in report.models.items():
        tables += [Text(f"warning: {name}: {text}", "yellow") for text in model.warnings]
    return Group(*tables)


def models_table(report: Report) -> Table:
    """Return a table of each model's metrics and raw rate (bits without entropy coding).

    A metric is shown as its mean, with half the width of its confidence interval. If a mean is over
    fewer images than the table's title says, the number of images is added.
    """
    # columns
    title = f"Models, {report.data['num_images']} images ({report.protocol['size']})"
    table = Table("model", "raw bpp", title=title, title_justify="left")
    for column in IMAGE_COLUMNS.values():
        table.add_column(column.heading, justify="right")
    distances = [d for d in DISTANCES if any(_distance(m, d) for m in report.models.values())]
    for distance in distances:
        table.add_column(distance, justify="right")

    # rows
    for name, model in report.models.items():
        cells = [
            mean_cell(report, getattr(model.metrics, metric), digits=column.digits)
            for metric, column in IMAGE_COLUMNS.items()
        ]
        cells += [_distance(model, distance) or ABSENT for distance in distances]
        raw = ABSENT if model.rate is None else f"{model.rate.raw_bpp:.3f}"
        table.add_row(Text(name), raw, *cells)
    return table


def codecs_table(report: Report) -> Table:
    """Return a table of each model's metrics, and the codecs' metrics at the model's raw rate."""
    title = (
        "Codecs at each model's raw rate: lowest quality at which an image's file reaches this "
        "rate, or quality 100 if no quality does"
    )
    table = Table("model", "codec", "bpp", title=title, title_justify="left")
    for heading in ("PSNR (dB)", "LPIPS alex"):
        table.add_column(heading, justify="right")
    for name, model in report.models.items():
        if not model.codecs_at_rate or model.rate is None:
            continue
        metrics = [
            _short_cell(report, getattr(model.metrics, metric), IMAGE_COLUMNS[metric].digits)
            for metric in ("psnr", "lpips_alex")
        ]
        table.add_row(Text(name), "(raw)", f"{model.rate.raw_bpp:.3f}", *metrics)
        for codec, point in model.codecs_at_rate.items():
            table.add_row("", codec, *_point_cells(report, point))
    return table


def bits_table(report: Report) -> Table:
    """Return a table of rate, quality and BD-rate of encoded latents and tokens.

    The table also has the BD-rates of the codecs.
    """
    title = "Entropy-coded latents and tokens, decoded from the bytes; BD-rate relative to JPEG"
    table = Table("model", "bpp", title=title, title_justify="left")
    for heading in ("PSNR (dB)", "LPIPS alex", "BD-rate PSNR", "BD-rate LPIPS"):
        table.add_column(heading, justify="right")
    for name, model in report.models.items():
        for number, point in enumerate(model.rate.points if model.rate else ()):
            rates = _bd_cells(report, name) if number == 0 else ("", "")
            table.add_row(Text(name if number == 0 else ""), *_point_cells(report, point), *rates)
    for name in (name for name in report.bd_rate if name not in report.models):
        table.add_row(name, "", "", "", *_bd_cells(report, name))
    return table


def passport_table(report: Report) -> Table:
    """Return a table of each model's results in half precision and in tiles, and its speed."""
    table = Table("model", title="Passport", title_justify="left")
    for heading in ("float16", "bfloat16", "tiling", "size of one image in px: encode, decode"):
        table.add_column(heading)
    for name, model in report.models.items():
        if not (model.passport or model.speed):
            continue
        passport = model.passport or {}
        precision = passport.get("precision", {})
        cells = [_precision(precision.get(dtype)) for dtype in ("float16", "bfloat16")]
        table.add_row(
            Text(name), *cells, _tiling(passport.get("tiling")), "\n".join(_speeds(model))
        )
    return table


def images_note(report: Report, images: int | None, *, exact: int = 0) -> str:
    """Return a note on a mean: the number of images, and the number of exact copies.

    The number of images is left out if the mean is over all images of the report.
    """
    fewer = images is not None and images < report.data["num_images"]
    notes = [f"{images} image{'' if images == 1 else 's'}"] if fewer else []
    notes += [f"{exact} exact"] if exact else []
    return f" ({', '.join(notes)})" if notes else ""


def _point_cells(report: Report, point: Point) -> Iterator[str]:
    """Yield the table cells for a point of a rate curve: bits per pixel, PSNR and LPIPS."""
    for column, digits in (("bpp", 3), ("psnr", 2), ("lpips_alex", 4)):
        value = getattr(point, column)
        note = images_note(report, point.images.get(column))
        yield ABSENT if value is None else f"{value:.{digits}f}{note}"


def _bd_cells(report: Report, name: str) -> tuple[str, str]:
    rate = report.bd_rate.get(name)
    values = (None, None) if rate is None else (rate.psnr, rate.lpips_alex)
    psnr, lpips = (ABSENT if value is None else f"{value:+.0f} %" for value in values)
    return psnr, lpips


def _distance(model: ModelReport, name: str) -> str | None:
    value = model.distribution and getattr(model.distribution, name)
    return None if value is None else f"{value:.4g}"


def _precision(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return ABSENT
    if not verdict["finite"]:
        return "overflows"
    close = f"PSNR {float(verdict['psnr']):.1f} dB to float32's"
    return f"{'safe' if verdict['safe'] else 'not safe'}, {close}"


def _tiling(check: dict[str, Any] | None) -> str:
    if check is None:
        return ABSENT
    if not check.get("fits", True):
        return "wrong sizes: see the warning"
    if "seam" not in check:
        return "not measured" if check["supported"] else "not supported"
    seam = "visible seams" if check["seam_visible"] else "no visible seam"
    tiles = (
        f"tiles of {check['tile']} px"
        if check["as_configured"]
        else (f"tiles of {check['tile']} px, smaller than those of enable_tiling()")
    )
    return "\n".join(
        [
            f"{seam}: step at tile borders up to {check['seam']:.1f} of 255 ({tiles})",
            f"tiled - whole: {float(check['psnr']):.1f} dB, "
            f"a pixel differs by up to {check['max_difference']:.0f} of 255",
        ]
    )


def _speeds(model: ModelReport) -> Iterator[str]:
    """Yield a line for each image size: images per second and peak memory in MiB."""
    points = (model.speed or {}).get("points", [])
    for size in sorted({point["size"] for point in points}):
        found = {point["call"]: point for point in points if point["size"] == size}
        yield f"{size}: " + ", ".join(_speed(found.get(call)) for call in ("encode", "decode"))


def _speed(point: dict[str, Any] | None) -> str:
    if point is None or "skipped" in point:
        return "skipped"
    return f"{point['images_per_second']:.3g}/s {point['peak_mib']:.0f} MiB"


def _short_cell(report: Report, mean: Mean | None, digits: int) -> str:
    """Return the table cell of a mean, without its confidence interval."""
    if mean is None:
        return ABSENT
    if math.isinf(mean.mean):
        return "exact"
    return f"{mean.mean:.{digits}f}{images_note(report, mean.num_values)}"


def mean_cell(report: Report, mean: Mean | None, *, digits: int) -> str:
    """Return the table cell of a mean, with half the width of its confidence interval."""
    if mean is None:
        return ABSENT
    if math.isinf(mean.mean):
        return "exact"
    half = ABSENT if mean.ci95 is None else f"{(mean.ci95[1] - mean.ci95[0]) / 2:.{digits}f}"
    note = images_note(report, mean.images, exact=mean.infinite)
    return f"{mean.mean:.{digits}f} \u00b1{half}{note}"
