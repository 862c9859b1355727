"""Compare detectors of anomalies on labelled tables, by the protocol of the DAGMM paper (2018).

    python benchmarks/anomaly.py --data tables --out anomaly.json --seeds 20

DAGMM is a deep autoencoding Gaussian mixture model. For each table and seed, the rows are split at
random into two halves. The detectors are trained on the normal rows of one half, and tested on the
other half. On KDDCUP, some detectors use only a part of the training rows or of the test rows. The
test rows with the largest scores are predicted to be anomalies. The fraction of predicted anomalies
is the fraction of anomalies that the DAGMM paper states (20 % for KDDCUP, 2.5 % for Thyroid, 15 %
for Arrhythmia). For other tables, the fraction of predicted anomalies is the fraction of anomalies
in the whole table.

The script prints the mean and standard deviation of F1 and AUROC over the seeds, and the mean rank
of each detector among the measured detectors. The script writes all results to one JSON file. To
continue after an interruption, run the same command again.
"""

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as RichTable
from scipy.io import loadmat
from scipy.stats import rankdata
from sklearn.ensemble import IsolationForest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import OneClassSVM

from latentvae.anomaly import DAGMM, LatentDensity, VAEDetector
from latentvae.anomaly.dagmm import PAPER_OPTIONS
from latentvae.anomaly.vae import SCORES
from latentvae.cli.flags import exit_with, parse_options
from latentvae.errors import UserError

SLOW_ROWS = 5_000  # training rows of detectors whose cost is quadratic in the number of rows
SLOW_TEST_ROWS = 20_000  # test rows of KDDCUP for these detectors, and for `pyod_vae`


@dataclass(frozen=True)
class Data:
    """A labelled table: its file, and the share of rows to flag as anomalies.

    If `share` is None, the share of anomalies in the table is used. `components` is the number of
    components of the detector `plain_gmm`.
    """

    file: str
    share: float | None = None
    components: int = 2


TABLES = {
    "kddcup": Data("kdd_cup.npz", 0.2, components=4),
    "thyroid": Data("38_thyroid.npz", 0.025),
    "arrhythmia": Data("arrhythmia.mat", 0.15),
    "annthyroid": Data("2_annthyroid.npz"),
    "cardio": Data("6_cardio.npz"),
}
# Trainings that are shorter than the paper's, chosen on other seeds (1001 to 1004), see
# docs/experiments/anomaly.md.
SHORTER: dict[str, dict[str, Any]] = {
    "kddcup": {"epochs": 24, "learning_rate": 2e-4, "schedule": "cosine"},
    "thyroid": {"epochs": 500, "learning_rate": 1e-3},
    "arrhythmia": {"epochs": 300, "learning_rate": 1e-3},
    "annthyroid": {"epochs": 250, "learning_rate": 1e-3},
    "cardio": {"epochs": 500, "learning_rate": 1e-3},
}
# Options with a wider latent, for Thyroid. The energy has 6 times the paper's weight, as if the
# squared error were a mean over the 6 columns.
WIDE = {"latent_dim": 3, "energy_weight": 0.6, "diagonal_weight": 0.0005}
NETWORKS = 8  # number of networks of each DAGMM. The first network alone is the paper's DAGMM.
LIKE = {"annthyroid": "thyroid", "cardio": "thyroid"}  # tables that are not in the paper


@dataclass(frozen=True)
class Options:
    """Options of the comparison: tables, detectors and seeds."""

    data: Path
    """Folder with the tables, such as 38_thyroid.npz of ADBench and kdd_cup.npz."""

    out: Path
    """JSON file for the results."""

    tables: tuple[str, ...] = tuple(TABLES)
    """Names of the tables to use."""

    detectors: tuple[str, ...] = ()
    """Names of the detectors to measure. By default, all detectors are measured."""

    seeds: int = 5
    """Number of seeds, counted from first_seed. A seed decides the split into training and test
    rows, and the random numbers of the training."""

    first_seed: int = 0
    """The first seed."""

    full_epochs: bool = False
    """Train DAGMM for as many epochs as its paper does. This takes hours on a CPU."""


def dagmm(name: str, seed: int, full: bool = False, **changes: Any) -> DAGMM:
    """Return a DAGMM of several networks, with the `PAPER_OPTIONS` for the table `name`.

    Tables that are not in the paper get the options of Thyroid. Unless `full` is true, the training
    is shorter than in the paper.
    """
    options = PAPER_OPTIONS[LIKE.get(name, name)] | ({} if full else SHORTER[name]) | changes
    return DAGMM(**options, num_networks=NETWORKS, constant_columns="keep", random_state=seed)


def wide_dagmm(name: str, seed: int, full: bool = False) -> DAGMM:
    """Return a DAGMM of several networks, with a latent of three dimensions."""
    return dagmm(name, seed, full, **WIDE)


def vae(name: str, seed: int) -> VAEDetector:
    """Return a VAE. For KDDCUP, few epochs are enough, because this table has many rows."""
    epochs = 3 if name == "kddcup" else 200
    return VAEDetector(epochs=epochs, constant_columns="keep", random_state=seed)


def density(kind: str) -> Callable[..., Any]:
    """Return a function that makes a `LatentDensity` for standardised table columns, not latents.

    `kind` is "gmm" (density under a Gaussian mixture) or "knn" (distance to the nearest rows).
    """
    return lambda name, seed: LatentDensity(
        density=kind, constant_columns="keep", random_state=seed
    )


class Plain:
    """A detector of another package. The rows that it gets are standardised or scaled to [0, 1]."""

    def __init__(self, detector: Any, scaler: Any) -> None:
        self.detector, self.scaler = detector, scaler

    def fit(self, rows: np.ndarray) -> "Plain":
        self.detector.fit(self.scaler.fit_transform(rows))
        return self

    def score_samples(self, rows: np.ndarray) -> np.ndarray:
        return self.detector.score_samples(self.scaler.transform(rows))


class PyodVAE:
    """PyOD's VAE with its default options. Both torch and PyOD's VAE get the seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, rows: np.ndarray) -> "PyodVAE":
        from pyod.models.vae import VAE  # pyright: ignore[reportMissingImports]

        torch.manual_seed(self.seed)
        self.detector = VAE(verbose=0, random_state=self.seed)
        self.detector.fit(rows)
        return self

    def score_samples(self, rows: np.ndarray) -> np.ndarray:
        return -self.detector.decision_function(rows)


DETECTORS: dict[str, Callable[..., Any]] = {
    "dagmm": dagmm,
    "dagmm_wide": wide_dagmm,
    "vae": vae,
    "density_gmm": density("gmm"),
    "density_knn": density("knn"),
    "plain_gmm": lambda name, seed: Plain(
        GaussianMixture(TABLES[name].components, reg_covar=1e-6, random_state=seed),
        MinMaxScaler(),
    ),
    "isolation_forest": lambda name, seed: Plain(
        IsolationForest(random_state=seed), MinMaxScaler()
    ),
    "lof": lambda name, seed: Plain(LocalOutlierFactor(novelty=True), StandardScaler()),
    "one_class_svm": lambda name, seed: Plain(OneClassSVM(nu=0.1), StandardScaler()),
    "pyod_vae": lambda name, seed: PyodVAE(seed),
}
# Largest number of training rows and of test rows, for large tables (KDDCUP).
TRAIN_ROWS = dict.fromkeys(["lof", "one_class_svm", "density_knn", "pyod_vae"], SLOW_ROWS)
TRAIN_ROWS |= dict.fromkeys(["plain_gmm", "density_gmm"], 50_000)
FEW_TEST_ROWS = {"lof", "one_class_svm", "density_knn", "pyod_vae", "vae"}
DAGMMS = {"dagmm", "dagmm_wide"}
NAMES = [
    "dagmm",
    "dagmm_mean",
    "dagmm_wide",
    "dagmm_wide_mean",
    *(f"vae_{kind}" for kind in SCORES),
    *list(DETECTORS)[3:],
]


def read(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (N, F) and labels (N,): 1 for anomalies."""
    path = folder / TABLES[name].file
    if not path.is_file():
        raise UserError(f"there is no file '{path}'")
    if path.suffix == ".mat":
        content = loadmat(path)
        return content["X"].astype(float), content["y"].ravel().astype(int)
    with np.load(path, allow_pickle=False) as content:
        if "kdd" in content:
            return content["kdd"][:, :-1], content["kdd"][:, -1].astype(int)
        return content["X"].astype(float), content["y"].astype(int)


def split(rows: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """Return the normal rows of one random half, and rows and labels of the other half."""
    order = np.random.default_rng(seed).permutation(len(labels))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    return rows[first[labels[first] == 0]], rows[second], labels[second]


def flag_top(scores: np.ndarray, share: float) -> np.ndarray:
    """Return 1 for the fraction `share` of rows with the largest scores, else 0."""
    flags = np.zeros(len(scores), dtype=int)
    flags[np.argsort(-scores, kind="stable")[: round(share * len(scores))]] = 1
    return flags


def measure(
    name: str, detector: str, seed: int, data: tuple[np.ndarray, np.ndarray], full: bool
) -> list[dict[str, Any]]:
    """Fit one detector on one split, and return its measures.

    The result has several rows for some detectors. A VAE has one row for each of its scores. DAGMM
    has one row for one network, and one row for the mean score of several networks.
    """
    rows, labels = data
    share = TABLES[name].share or float(labels.mean())
    train, test, truth = split(rows, labels, seed)
    rng = np.random.default_rng(seed)
    train = train[rng.permutation(len(train))[: TRAIN_ROWS.get(detector, len(train))]]
    if detector in FEW_TEST_ROWS:
        kept = rng.permutation(len(test))[:SLOW_TEST_ROWS]
        test, truth = test[kept], truth[kept]

    start = time.process_time()
    lengths = {"full": full} if detector in DAGMMS else {}
    made = DETECTORS[detector](name, seed, **lengths)
    made.fit(train)
    seconds = time.process_time() - start
    found = []
    for label, scores in scored(made, test, detector):
        found.append(
            {
                "table": name,
                "detector": label,
                "seed": seed,
                "f1": float(f1_score(truth, flag_top(scores, share))),
                "auroc": float(roc_auc_score(truth, scores)),
                "average_precision": float(average_precision_score(truth, scores)),
                "training_rows": len(train),
                "test_rows": len(test),
                "fit_cpu_seconds": round(seconds, 1),
            }
        )
    return found


def scored(made: Any, test: np.ndarray, detector: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield pairs: the name of a result, and the anomaly scores of the test rows."""
    if detector in DAGMMS:  # the first network alone, and the mean of all
        yield f"{detector}_mean", -made.score_samples(test)
        first = copy.copy(made)
        first.networks_, first.mixtures_ = made.networks_[:1], made.mixtures_[:1]
        yield detector, -first.score_samples(test)
        return
    if not isinstance(made, VAEDetector):
        yield detector, -made.score_samples(test)
        return
    for criterion in SCORES:
        yield f"vae_{criterion}", -made.set_params(criterion=criterion).score_samples(test)


def show(results: list[dict[str, Any]]) -> None:
    """Print a table for F1 and one for AUROC: mean, standard deviation and mean rank."""
    tables = sorted({r["table"] for r in results}, key=list(TABLES).index)
    names = [n for n in NAMES if any(r["detector"] == n for r in results)]
    for key in ("f1", "auroc"):
        page = RichTable("detector", *tables, "mean rank", title=key)
        means = np.full((len(names), len(tables)), np.nan)
        cells = [["" for _ in tables] for _ in names]
        for i, name in enumerate(names):
            for j, table in enumerate(tables):
                found = [r[key] for r in results if (r["detector"], r["table"]) == (name, table)]
                if found:
                    means[i, j] = np.mean(found)
                    cells[i][j] = f"{means[i, j]:.3f} ± {np.std(found):.3f} ({len(found)})"
        ranks = np.stack([ranks_of(means[:, j]) for j in range(len(tables))], axis=1)
        for i, name in enumerate(names):
            found = ranks[i][np.isfinite(ranks[i])]
            page.add_row(name, *cells[i], f"{found.mean():.2f} of {len(found)}")
        Console(width=160).print(page)


def ranks_of(means: np.ndarray) -> np.ndarray:
    """Return the rank of each detector on one table, 1 for the largest mean. NaN stays NaN."""
    ranks, known = np.full(len(means), np.nan), np.isfinite(means)
    ranks[known] = rankdata(-means[known])
    return ranks


def run(options: Options) -> None:
    """Measure all results that are not in the JSON file yet."""
    for given, known in ((options.tables, TABLES), (options.detectors, DETECTORS)):
        if unknown := set(given) - set(known):
            raise UserError(
                f"table or detector '{sorted(unknown)[0]}' is not one of {', '.join(known)}"
            )
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(r["table"], r["detector"], r["seed"]) for r in results}

    for name in options.tables:
        data = read(options.data, name)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for detector in options.detectors or DETECTORS:
                result = f"vae_{next(iter(SCORES))}" if detector == "vae" else detector
                if (name, result, seed) in done:
                    continue
                try:
                    results += measure(name, detector, seed, data, options.full_epochs)
                except ImportError as error:  # PyOD is optional
                    print(f"left out {detector}: {error}")
                    continue
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    try:
        run(parse_options(Options, sys.argv[1:], prog="benchmarks/anomaly.py"))
    except UserError as error:
        exit_with(error)
