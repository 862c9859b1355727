"""Fit a detector on a table file, and score another table with it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latentvae.anomaly.checks import check_choice
from latentvae.anomaly.dagmm import DAGMM
from latentvae.anomaly.detector import Detector
from latentvae.anomaly.latent_density import LatentDensity
from latentvae.anomaly.results import Results, check_both_classes, held_out
from latentvae.anomaly.saving import load_detector, save_detector
from latentvae.anomaly.tables import TableEncoder, labels_of, read_table, without
from latentvae.anomaly.vae import VAEDetector
from latentvae.errors import UserError
from latentvae.files import read_json

RUN_NAME, RUN_FORMAT = "anomaly.json", 1
METHODS: dict[str, Callable[..., Detector]] = {
    "dagmm": DAGMM,
    "vae": VAEDetector,
    "latent_density": LatentDensity,
}


def fit_table(
    data: Path,
    out: Path,
    *,
    method: str = "vae",
    options: dict[str, Any] | None = None,
    labels: str | None = None,
    drop: Sequence[str] = (),
    held_out_share: float = 0.2,
    false_alarm_rate: float = 0.01,
    seed: int = 0,
) -> Detector:
    """Fit a detector on clean rows, set its threshold on held-out rows, and save it.

    Clean rows are rows without anomalies.

    Args:
        data: file with a table of clean rows.
        out: folder for the detector.
        method: "dagmm", "vae" or "latent_density".
        options: options of the detector's class, except `constant_columns`, `false_alarm_rate` and
            `random_state`, which this function sets.
        labels: name of the column with 0 (normal) and 1 (anomaly). Rows with 1 are left out.
        drop: columns that are not used.
        held_out_share: share of the clean rows that are used only for the threshold.
        false_alarm_rate: allowed share of clean rows that are flagged as anomalies.
        seed: seed of the choice of held-out rows and of the training.

    Raises:
        UserError: the table or an option is wrong.
        TypeError: `options` has a name that is not allowed.
    """
    check_choice("method", method, tuple(METHODS))
    table = read_table(data)
    if labels is not None:
        table = without(table.loc[labels_of(table, labels) == 0], [labels])
    table = without(table, drop)
    _check_columns(table)

    # Categories come from all clean rows, so that no held-out row has an unknown category.
    encoder = TableEncoder().fit(table)
    rows = pd.DataFrame(encoder.transform(table), columns=encoder.names_)
    train, clean = held_out(len(rows), held_out_share, seed)
    detector = METHODS[method](
        **(options or {}),
        constant_columns="keep",  # a rare category may be absent from the training rows
        false_alarm_rate=false_alarm_rate,
        random_state=seed,
    )
    detector.fit(rows.iloc[train]).calibrate(rows.iloc[clean])

    save_detector(detector, out)
    content = {
        "format": RUN_FORMAT,
        "kind": "table",
        "method": method,
        "encoder": encoder.to_json(),
        "false_alarm_rate": false_alarm_rate,
        "threshold": -detector.offset_,
        "training_items": len(train),
        "held_out_items": len(clean),
        "held_out_flagged": int((detector.predict(rows.iloc[clean]) < 0).sum()),
    }
    write_run(out, content)
    return detector


def score_table(folder: Path, data: Path, *, labels: str | None = None) -> Results:
    """Score the rows of a table with a detector that `fit_table` saved.

    Args:
        folder: folder of the detector.
        data: file with a table. The table needs the columns that the detector was fitted on.
            Other columns are ignored.
        labels: name of the column with 0 (normal) and 1 (anomaly).

    Raises:
        UserError: the folder, the table or the labels are wrong.
    """
    detector, encoder = load_detector(folder), TableEncoder.from_json(read_run(folder)["encoder"])
    table = read_table(data)
    truth = None if labels is None else labels_of(table, labels)
    if truth is not None:
        check_both_classes(truth, f"column '{labels}'")
    rows = pd.DataFrame(encoder.transform(table), columns=encoder.names_)
    names = [str(i + 1) for i in range(len(table))]
    return Results(names, -detector.score_samples(rows), -detector.offset_, truth)


def write_run(folder: Path, content: dict[str, Any]) -> None:
    """Write as JSON what scoring needs besides the detector itself, such as a table's encoder."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / RUN_NAME).write_text(text, encoding="utf-8")


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content that `write_run` wrote.

    Raises:
        UserError: the folder holds no detector of the current format.
    """
    if not (folder / RUN_NAME).is_file():
        raise UserError(f"'{folder}' holds no detector: `latentvae anomaly fit` writes one.")
    content = read_json(folder / RUN_NAME)
    if not isinstance(content, dict) or content.get("format") != RUN_FORMAT:
        raise UserError(
            f"'{folder / RUN_NAME}' is not a detector of format {RUN_FORMAT}. Run the fit again."
        )
    return content


def _check_columns(table: pd.DataFrame) -> None:
    """Check that no column has only one value. The user decides whether to drop such a column.

    Raises:
        UserError: a column is constant, there is no column, or there are fewer than two rows.
    """
    if not len(table.columns):
        raise UserError("the table has no columns left: drop fewer columns.")
    if len(table) < 2:
        raise UserError(f"{len(table)} clean row(s) are too few: give at least 4.")
    for name in table.columns:
        values: Any = table[name]
        if not values.isna().any() and values.nunique() == 1:
            raise UserError(
                f"column '{name}' has the value {np.asarray(values)[0]!s} in all {len(table)} "
                f"clean rows, so nothing can be learned from it. Add --drop {name}"
            )
