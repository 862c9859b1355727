"""Write the anomaly scores of rows or images. With labels, also write measures such as AUROC."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from latentvae.errors import UserError
from latentvae.text import spreadsheet_text


@dataclass(frozen=True)
class Results:
    """Anomaly scores of N items (table rows or images). A larger score is more anomalous.

    Attributes:
        names: name of each item: the row number of a table, from 1, or the path of an image.
        scores: anomaly scores, (N,).
        threshold: items with a larger score are flagged as anomalies.
        labels: 0 for normal items and 1 for anomalies, (N,), or None.
    """

    names: Sequence[str]
    scores: np.ndarray
    threshold: float
    labels: np.ndarray | None = None

    @property
    def flagged(self) -> np.ndarray:
        """Whether each item is flagged as an anomaly, (N,)."""
        return self.scores > self.threshold

    def summary(self) -> dict[str, int | float]:
        """Return the numbers of all items and of flagged items, the threshold, and measures.

        The measures `auroc`, `average_precision` and `f1` are returned only with labels. `auroc`
        and `average_precision` do not depend on the threshold, but `f1` does.
        """
        found: dict[str, int | float] = {
            "items": len(self.scores),
            "threshold": self.threshold,
            "flagged": int(self.flagged.sum()),
        }
        return found if self.labels is None else found | self._measures(self.labels)

    def _measures(self, labels: np.ndarray) -> dict[str, float]:
        return {
            "auroc": float(roc_auc_score(labels, self.scores)),
            "average_precision": float(average_precision_score(labels, self.scores)),
            "f1": float(f1_score(labels, self.flagged)),
        }

    def write(self, out: Path, json_file: Path | None) -> None:
        """Write scores.csv into `out`, and the summary as JSON to `json_file` unless it is None."""
        out.mkdir(parents=True, exist_ok=True)
        labels = [None] * len(self.scores) if self.labels is None else self.labels
        header = ["item", "score", "flagged", *([] if self.labels is None else ["label"])]
        with (out / "scores.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for row in zip(self.names, self.scores, self.flagged, labels, strict=True):
                name, score, flagged, label = row
                cells = [spreadsheet_text(name), repr(float(score)), int(flagged), label]
                writer.writerow(cells[: len(header)])
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(self.summary(), indent=1) + "\n", encoding="utf-8")


def check_both_classes(labels: np.ndarray, where: str) -> None:
    """Check that labels hold normal items and anomalies. Measures such as AUROC need both classes.

    Raises:
        UserError: the labels hold only one class.
    """
    if len(set(labels.tolist())) < 2:
        raise UserError(
            f"{where} hold(s) one class only, {labels[0]}, in all {len(labels)} items. AUROC, "
            "average precision and F1 need both classes: leave --labels out."
        )


def held_out(num_items: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the sorted indices of the training items, and of the held-out items.

    The held-out items are chosen at random. `share` is their share of all items.

    Raises:
        UserError: `share` is not between 0 and 1, or there are too few items.
    """
    if not 0 < share < 1:
        raise UserError(f"held_out must be a share between 0 and 1 (got {share:g}).")
    num_held_out = max(1, round(share * num_items))
    if num_items - num_held_out < 2:
        raise UserError(f"{num_items} clean item(s) are too few: give at least 4.")
    order = np.random.default_rng(seed).permutation(num_items)
    return sorted(order[num_held_out:].tolist()), sorted(order[:num_held_out].tolist())
