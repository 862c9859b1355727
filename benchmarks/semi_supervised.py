"""Measure the test error of semi-supervised classifiers that learn from few labels.

    python benchmarks/semi_supervised.py --train digits --test digits_test --json out.json

For each seed, the script keeps the labels of a few images of each class, drawn at random. The
script fits every classifier on all training images, and counts the classifier's errors on the test
images. The script also fits a logistic regression on the labelled images alone, to show how much
the images without labels help.
"""

import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from latentvae.cli.flags import exit_with, parse_options
from latentvae.errors import UserError
from latentvae.semi_supervised import (
    M1Classifier,
    M1M2Classifier,
    M2Classifier,
    keep_labels,
    read_images,
)

KINDS: dict[str, Any] = {"m1": M1Classifier, "m2": M2Classifier, "m1m2": M1M2Classifier}


@dataclass(frozen=True)
class Options:
    """Options: which classifiers to measure, and on which images."""

    train: str
    """Training images: a folder that has one folder per class, or a parquet file with labels."""

    test: str
    """Test images, with the same classes as the training images."""

    json: Path
    """JSON file for the results."""

    resolution: int = 28
    """Height and width of the images in pixels."""

    labels_per_class: int = 10
    """Number of training images of each class whose labels the classifiers get. All other training
    images are used without labels."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the measurements. For each seed, the labelled images are drawn at random and every
    classifier is fitted once."""

    classifiers: tuple[str, ...] = ("m1", "m2", "m1m2")
    """Classifiers to fit: some of m1, m2 and m1m2 (arXiv:1406.5298)."""

    vae: str | None = None
    """Exported VAE of `latentvae train-vae`, which the classifiers m1 and m1m2 use. By default,
    these classifiers train their own VAE."""

    options: str = "{}"
    """Other options of the classifiers as JSON, such as '{"epochs": 50}'."""


def main(options: Options) -> None:
    train, test = (
        read_images(d, resolution=options.resolution) for d in (options.train, options.test)
    )
    results: dict[str, list[float]] = {}
    for seed in options.seeds:
        labels = keep_labels(train.labels, per_class=options.labels_per_class, seed=seed)
        known = labels >= 0
        simple = LogisticRegression(max_iter=1000).fit(train.rows[known], labels[known])
        found = {"logistic": (error_of(simple, test.rows, test.labels), 0.0)}
        for name in options.classifiers:
            found[name] = measured(name, options, seed, train.rows, labels, test)
        for name, (wrong, seconds) in found.items():
            results.setdefault(name, []).append(wrong)
            print(f"seed {seed} {name:9s} {wrong:6.2f} % error, {seconds:.0f} s of CPU", flush=True)
        options.json.write_text(json.dumps({"seeds": options.seeds, "error": results}, indent=1))
    for name, errors in results.items():
        print(f"{name:9s} {np.mean(errors):6.2f} +- {np.std(errors):.2f} % error")


def measured(
    name: str, options: Options, seed: int, rows: np.ndarray, labels: np.ndarray, test: Any
) -> tuple[float, float]:
    """Return the error on test images in percent, and the CPU seconds of the fit."""
    given = json.loads(options.options) | {"random_state": seed}
    if options.vae is not None and name != "m2":
        given["vae"] = options.vae
    start = cpu_seconds()
    model = KINDS[name](**given).fit(rows, labels)
    seconds = cpu_seconds() - start
    return error_of(model, test.rows, test.labels), seconds


def error_of(model: Any, rows: np.ndarray, labels: np.ndarray) -> float:
    return 100.0 * (1.0 - float(model.score(rows, labels)))


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    try:
        main(parse_options(Options, sys.argv[1:], prog="semi_supervised.py"))
    except UserError as error:
        exit_with(error)
