"""Several reports in one table, if they were measured under the same protocol.

latentvae compare a/report.json b/report.json --markdown
"""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from latentvae.errors import UserError
from latentvae.report.names import unique_names
from latentvae.report.schema import IMAGE_COLUMNS, Mean, ModelReport, Report
from latentvae.report.tables import ABSENT, DISTANCES, images_note
from latentvae.text import markdown_text

# Reports stay comparable if they differ only in these parts of the protocol.
INCIDENTAL = ("versions", "device", "codecs", "bitstream", "threads")
SHOWN = 80  # characters of a value that differs


def read_reports(paths: Sequence[Path]) -> dict[str, Report]:
    """Read reports, given as files or as their folders. Return them by the names to show."""
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
    """Return the differences that make the reports incomparable, one phrase for each.

    Ignored are parts that one report lacks (as VGG after `--quick`), versions, devices, and the
    settings of codecs and bitstreams.
    """
    facts = {name: _facts(report) for name, report in reports.items()}
    found = []
    for (first, a), (second, b) in itertools.combinations(facts.items(), 2):
        for key in sorted(a.keys() & b.keys()):
            if a[key] != b[key]:
                found.append(f"{key}: {_shown(a[key])} in {first}, {_shown(b[key])} in {second}")
    return found


def compare(paths: Sequence[Path], *, force: bool = False) -> Table:
    """Return a table with one row for each model of each report.

    Raises:
        UserError: fewer than two reports, or other protocols or images without `force`.
    """
    if len(paths) < 2:
        raise UserError(f"compare needs at least 2 reports (got {len(paths)}).")
    reports = read_reports(paths)
    unlike = differences(reports)
    if unlike and not force:
        raise UserError(
            f"these reports were not measured alike ({'; '.join(unlike)}). Measure them again "
            "with the same options, or compare anyway with --force."
        )

    # rows and columns
    rows = [
        (name if len(report.models) == 1 else f"{name}: {model}", report, model)
        for name, report in reports.items()
        for model in report.models
    ]
    columns = _columns([report.models[model] for _, report, model in rows])
    if not _same_rates(list(reports.values())):
        columns.pop("BD-rate", None)

    # table
    table = Table("model", *columns, title="not measured alike" if unlike else None)
    for label, report, model in rows:
        table.add_row(Text(label), *(_cell(report, model, column) for column in columns))
    return table


def markdown(table: Table) -> str:
    """Return the table in Markdown, numbers aligned to the right."""
    headings = [str(column.header) for column in table.columns]
    cells = [[markdown_text(str(cell)) for cell in column.cells] for column in table.columns]
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = [headings, rule, *zip(*cells, strict=True)]
    note = [f"{table.title}", ""] if table.title else []
    return "\n".join(note + [f"| {' | '.join(line)} |" for line in lines])


def _facts(report: Report) -> dict[str, Any]:
    """Return the parts that must be equal, by name.

    Feature extractors are separate parts, because some reports have fewer of them.
    """
    facts = {key: value for key, value in report.protocol.items() if key not in INCIDENTAL}
    for part in ("lpips", "distribution"):
        facts |= {f"{part} {net}": value for net, value in facts.pop(part, {}).items()}
    pixels = report.data.get("pixels_sha256_sum")
    return facts | ({"images": f"{report.data['num_images']} of sum {pixels}"} if pixels else {})


def _same_rates(reports: Sequence[Report]) -> bool:
    """Return whether points and anchor of the curves were measured with the same settings."""
    keys = ("curves", "bitstream", "codecs")
    first, *others = ([report.protocol.get(key) for key in keys] for report in reports)
    return all(other == first for other in others)


def _columns(models: Sequence[ModelReport]) -> dict[str, str]:
    """Return the headings of columns with at least one value, and where the values are."""
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
    if mean is None:
        return ABSENT
    if math.isinf(mean.mean):
        return "exact"
    note = images_note(report, mean.num_values)
    return f"{mean.mean:.{column.digits}f}{note}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
