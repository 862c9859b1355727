"""Put several reports into one table, if they were measured under the same protocol.

The command is `latentvae compare a/report.json b/report.json --markdown`.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from latentvae.errors import UserError, printable
from latentvae.report.names import unique_names
from latentvae.report.paired import Difference, Values, paired_difference, read_values, values_of
from latentvae.report.schema import IMAGE_COLUMNS, Mean, ModelReport, Report
from latentvae.report.tables import ABSENT, DISTANCES, mean_cell
from latentvae.text import markdown_text

# Reports stay comparable if they differ only in these parts of the protocol.
INCIDENTAL = ("versions", "device", "codecs", "bitstream", "threads", "sections")
BEST, CLEAR = "(best)", "(clear)"
SHOWN = 80  # longest text of a value that differs, in characters


def read_reports(paths: Sequence[Path]) -> dict[str, Report]:
    """Read reports from files or folders. Return a dict from each report's name to the report."""
    files = [path / "report.json" if path.is_dir() else path for path in paths]
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise UserError("a report is given twice. Give each report once.")
    places = [file.parent if file.name == "report.json" else file.with_suffix("") for file in files]
    return dict(zip(unique_names(places), map(_read, files), strict=True))


def _read(file: Path) -> Report:
    report = Report.read(file)
    parts = [report.protocol.get(part, {}) for part in ("lpips", "distribution")]
    count = report.data.get("num_images")
    if not isinstance(count, int) or not all(isinstance(part, dict) for part in parts):
        raise UserError(
            f"'{file}' is not a report of latentvae: its data or its protocol is damaged."
        )
    return report


def differences(reports: Mapping[str, Report]) -> list[str]:
    """Return a phrase for each difference that makes the reports incomparable.

    Parts of a protocol that one report lacks are ignored, such as LPIPS with VGG after `--quick`.
    Differences of versions, devices, threads, sections, codecs and bitstreams are ignored too.
    """
    facts = {name: _facts(report) for name, report in reports.items()}
    found = []
    for (first, a), (second, b) in itertools.combinations(facts.items(), 2):
        for key in sorted(a.keys() & b.keys()):
            if a[key] != b[key]:
                found.append(f"{key}: {_shown(a[key])} in {first}, {_shown(b[key])} in {second}")
    return found


@dataclass(frozen=True, eq=False)
class _Row:
    """A row of the tables: a model, the name to show, and its values for each image."""

    label: str
    report: Report
    model: str
    values: dict[str, Values]


def compare(paths: Sequence[Path], *, force: bool = False) -> list[Table]:
    """Return a table of all models, and a table of differences from the first model.

    A difference is the mean, over the images, of the difference on each image. If there are no
    differences to show, such as for only one model, the second table is left out.

    Args:
        paths: report.json files or their folders. One report with several models is enough.
        force: also compare reports with different protocols or images. For such reports, the table
            of differences is left out.

    Raises:
        UserError: there is no report, or protocols or images differ and `force` is false.
    """
    if not paths:
        raise UserError("compare needs at least 1 report (got none).")
    reports = read_reports(paths)
    unlike = differences(reports)
    if unlike and not force:
        raise UserError(
            f"the protocols or images of these reports differ ({'; '.join(unlike)}). Measure again "
            "with the same options and images, or compare anyway with --force."
        )

    # tables
    rows = _rows(reports, paths)
    with_rates = _same_rates(list(reports.values()))
    table = _values_table(rows, with_rates=with_rates)
    if unlike:
        table.title = "not measured alike"
        return [table]
    found = _differences_table(rows)
    return [table] if found is None else [table, found]


def _rows(reports: Mapping[str, Report], paths: Sequence[Path]) -> list[_Row]:
    """Return a row for each model, with the name to show.

    If models of several reports have the same name, the name of the report is added to the model's
    name. The linear code (principal components of patches) is a baseline. The linear code is shown
    once if its values are the same in all reports.
    """
    # models of each report. Each different linear code is listed once.
    shown: dict[str, list[str]] = {}
    linear: list[ModelReport] = []
    for name, report in reports.items():
        shown[name] = [
            model
            for model, found in report.models.items()
            if not (_is_linear(found) and found in linear)
        ]
        linear += [found for found in report.models.values() if _is_linear(found)]

    # rows
    counts = Counter(model for models in shown.values() for model in models)
    rows = []
    for (name, report), path in zip(reports.items(), paths, strict=True):
        # If the report's file has another name than report.json, the per_image.csv beside it may
        # belong to another evaluation.
        folder = path if path.is_dir() else path.parent
        own_table = path.is_dir() or path.name == "report.json"
        values = read_values(folder) if own_table else {}
        for model in shown[name]:
            label = model if counts[model] == 1 else f"{name}: {model}"
            rows.append(_Row(label, report, model, values_of(values, model)))
    return rows


def _values_table(rows: Sequence[_Row], *, with_rates: bool) -> Table:
    """Return a table of the models' values. The best value of each column is marked."""
    columns = _columns([row.report.models[row.model] for row in rows])
    if not with_rates:
        columns.pop("BD-rate", None)
    table = Table("model", *columns)
    best = {column: _best(rows, column, part) for column, part in columns.items()}
    for row in rows:
        cells = [
            _cell(row.report, row.model, column) + (f" {BEST}" if row in best[column] else "")
            for column in columns
        ]
        table.add_row(Text(row.label), *cells)
    if any(best.values()):
        table.caption = f"{BEST}: best in column. \u00b1: half of the 95 % interval over images."
    return table


def _best(rows: Sequence[_Row], column: str, part: str) -> list[_Row]:
    """Return the rows with the best value of a column.

    The list is empty for raw rates (size without entropy coding), and if no value is better than
    another. The linear code, a baseline, is never among the best rows.
    """
    if column == "raw bpp":
        return []
    found = {
        i: value
        for i, row in enumerate(rows)
        if not _is_linear(row.report.models[row.model])
        and (value := _number(row, part)) is not None
    }
    if len(found) < 2:
        return []
    higher = part in IMAGE_COLUMNS and not part.startswith("lpips")
    best = (max if higher else min)(found.values())
    chosen = [rows[i] for i, value in found.items() if value == best]
    return chosen if len(chosen) < len(found) else []


def _is_linear(model: ModelReport) -> bool:
    """Return whether a model is the linear code (principal components of patches), a baseline."""
    return model.info.get("class") == "LinearCode"


def _number(row: _Row, part: str) -> float | None:
    model = row.report.models[row.model]
    if part == "bd_rate":
        rate = row.report.bd_rate.get(row.model)
        return None if rate is None else rate.psnr
    if part in DISTANCES:
        return model.distribution and getattr(model.distribution, part)
    mean: Mean | None = getattr(model.metrics, part)
    return None if mean is None else mean.mean


def _differences_table(rows: Sequence[_Row]) -> Table | None:
    """Return a table of paired differences from the first model, or None if there are none."""
    first, *others = rows
    metrics = [metric for metric in IMAGE_COLUMNS if any(metric in row.values for row in others)]
    found = {
        (i, metric): difference
        for i, row in enumerate(others)
        for metric in metrics
        if metric in first.values
        and metric in row.values
        and (difference := paired_difference(first.values[metric], row.values[metric]))
    }
    if not found:
        return None

    # one row per model, one column per metric
    metrics = [metric for metric in metrics if any(key[1] == metric for key in found)]
    count = max(difference.images for difference in found.values())
    table = Table("model", *(IMAGE_COLUMNS[metric].heading for metric in metrics))
    # Use a `Text`, because rich reads brackets in a string as markup.
    table.title = Text(
        f"Difference from {printable(first.label)} on the same images ({count} images)"
    )
    table.caption = Text(f"Mean [95 % interval]. {CLEAR}: the 95 % interval excludes 0.")
    for i, row in enumerate(others):
        cells = [_difference_cell(found.get((i, m)), IMAGE_COLUMNS[m].digits) for m in metrics]
        table.add_row(Text(row.label), *cells)
    return table


def _difference_cell(difference: Difference | None, digits: int) -> Text:
    if difference is None:
        return Text(ABSENT)
    low, high = (f"{value:+.{digits}f}" for value in (difference.low, difference.high))
    mark = f" {CLEAR}" if difference.is_clear else ""
    return Text(f"{difference.mean:+.{digits}f} [{low}, {high}]{mark}")


def markdown(table: Table) -> str:
    """Return the table in Markdown. All columns but the first are aligned to the right."""
    headings = [str(column.header) for column in table.columns]
    cells = [[markdown_text(str(cell)) for cell in column.cells] for column in table.columns]
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = [headings, rule, *zip(*cells, strict=True)]
    title = [markdown_text(str(table.title)), ""] if table.title else []
    caption = ["", markdown_text(str(table.caption))] if table.caption else []
    return "\n".join([*title, *(f"| {' | '.join(line)} |" for line in lines), *caption])


def _facts(report: Report) -> dict[str, Any]:
    """Return the parts of a report that must be equal for a comparison, by name.

    Each feature extractor is a separate part, because some reports have fewer extractors.
    """
    facts = {key: value for key, value in report.protocol.items() if key not in INCIDENTAL}
    for part in ("lpips", "distribution"):
        facts |= {f"{part} {net}": value for net, value in facts.pop(part, {}).items()}
    pixels = report.data.get("pixels_sha256_sum")
    return facts | ({"images": f"{report.data['num_images']} of sum {pixels}"} if pixels else {})


def _same_rates(reports: Sequence[Report]) -> bool:
    """Return whether the rate curves of all reports were measured with the same settings."""
    keys = ("curves", "bitstream", "codecs")
    first, *others = ([report.protocol.get(key) for key in keys] for report in reports)
    return all(other == first for other in others)


def _columns(models: Sequence[ModelReport]) -> dict[str, str]:
    """Return heading and report key of each column that has at least one value."""
    found = {"raw bpp": "raw_bpp"}
    found |= {
        column.heading: metric
        for metric, column in IMAGE_COLUMNS.items()
        if any(getattr(model.metrics, metric) for model in models)
    }
    found |= {
        distance: distance
        for distance in DISTANCES
        if any(m.distribution and getattr(m.distribution, distance) is not None for m in models)
    }
    return found | ({"BD-rate": "bd_rate"} if any(m.rate and m.rate.points for m in models) else {})


def _cell(report: Report, name: str, heading: str) -> str:
    """Return a model's value in one column as text."""
    model = report.models[name]

    # rate and distances
    if heading == "raw bpp":
        return ABSENT if model.rate is None else f"{model.rate.raw_bpp:.3f}"
    if heading == "BD-rate":
        rate = report.bd_rate.get(name)
        return ABSENT if rate is None or rate.psnr is None else f"{rate.psnr:+.0f} %"
    if heading in DISTANCES:
        value = model.distribution and getattr(model.distribution, heading)
        return ABSENT if value is None else f"{value:.4g}"

    # metrics of images
    metric, column = next(item for item in IMAGE_COLUMNS.items() if item[1].heading == heading)
    mean: Mean | None = getattr(model.metrics, metric)
    return mean_cell(report, mean, digits=column.digits)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
