"""The benchmark of detectors: DAGMM's protocol, and results that continue."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "anomaly.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_anomaly", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_half_of_all_rows_are_for_training_and_only_normal_ones(script: ModuleType) -> None:
    rows, labels = np.arange(100.0)[:, None], np.arange(100) % 4 == 0
    train, test, truth = script.split(rows, labels.astype(int), seed=3)
    assert len(test) == 50 and len(train) == 50 - (25 - truth.sum())
    assert not set(train[:, 0]) & set(test[:, 0]) and (train[:, 0] % 4 != 0).all()
    assert (truth == (test[:, 0] % 4 == 0)).all() and 0 < truth.sum() < 25


def test_the_given_share_of_the_test_rows_is_flagged(script: ModuleType) -> None:
    assert script.flag_top(np.array([3.0, 1.0, 5.0, 4.0]), 0.5).tolist() == [0, 0, 1, 1]
    ranks = script.ranks_of(np.array([0.5, np.nan, 0.9]))
    assert ranks[0] == 2 and ranks[2] == 1 and np.isnan(ranks[1])


def test_dagmm_has_a_row_for_one_network_and_one_for_the_mean(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.SHORTER, "thyroid", {"epochs": 2})
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(200, 6)), (np.arange(200) % 10 == 0).astype(int)
    mean, one = script.measure("thyroid", "dagmm", 0, (rows, labels), full=False)
    assert (mean["detector"], one["detector"]) == ("dagmm_mean", "dagmm")
    train, test, truth = script.split(rows, labels, seed=0)
    train = train[np.random.default_rng(0).permutation(len(train))]
    alone = script.dagmm("thyroid", 0).set_params(num_networks=1).fit(train)
    scores = -alone.score_samples(test)
    assert one["auroc"] == script.roc_auc_score(truth, scores) != mean["auroc"]


def test_results_are_kept_and_continued(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(200, 6)), (np.arange(200) % 10 == 0).astype(int)
    rows[labels == 1] += 4
    np.savez(tmp_path / "38_thyroid.npz", X=rows, y=labels)
    out = tmp_path / "r.json"
    for seeds in (1, 2):
        script.run(
            script.Options(
                tmp_path,
                out,
                tables=("thyroid",),
                detectors=("plain_gmm", "isolation_forest"),
                seeds=seeds,
            )
        )
    found = json.loads(out.read_text())
    assert [(r["detector"], r["seed"]) for r in found] == [
        (name, seed) for seed in (0, 1) for name in ("plain_gmm", "isolation_forest")
    ]
    assert all(r["auroc"] > 0.95 for r in found)
    assert "mean rank" in capsys.readouterr().out
