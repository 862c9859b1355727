"""Reading tables, encoding their columns, and the runs on them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.utils.estimator_checks import check_get_params_invariance

from latentvae.anomaly.results import Results, held_out
from latentvae.anomaly.table_runs import fit_table, score_table
from latentvae.anomaly.tables import TableEncoder, labels_of, read_table
from latentvae.errors import UserError


def machine(num_rows: int = 80, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    load = rng.normal(size=num_rows)
    return pd.DataFrame(
        {
            "load": load,
            "heat": 2 * load + 0.1 * rng.normal(size=num_rows),
            "line": rng.choice(["north", "south"], num_rows),
            "night": rng.random(num_rows) < 0.5,
        }
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_survives_its_file(suffix: str, tmp_path: Path) -> None:
    table, path = machine(), tmp_path / f"t{suffix}"
    table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path)
    encoder = TableEncoder().fit(table)
    np.testing.assert_allclose(encoder.transform(read_table(path)), encoder.transform(table))


def test_arrays_have_numbered_columns(tmp_path: Path) -> None:
    rows, labels = np.arange(6.0).reshape(3, 2), np.array([0, 1, 0])
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "b.npz", X=rows, y=labels)
    assert list(read_table(tmp_path / "a.npy").columns) == ["x0", "x1"]
    table = read_table(tmp_path / "b.npz")
    assert list(table.columns) == ["x0", "x1", "y"] and labels_of(table, "y").tolist() == [0, 1, 0]


def test_one_hot_columns_are_those_of_pandas() -> None:
    table = machine()
    encoder = TableEncoder().fit(table)
    expected = pd.get_dummies(table, columns=["line", "night"], prefix_sep="=", dtype=float)
    assert encoder.names_ == list(expected.columns)
    np.testing.assert_array_equal(encoder.transform(table), expected.to_numpy())
    check_get_params_invariance("TableEncoder", TableEncoder())


def test_the_encoder_survives_json_and_other_orders_of_columns() -> None:
    table = machine()
    encoder = TableEncoder().fit(table)
    again = TableEncoder.from_json(json.loads(json.dumps(encoder.to_json())))
    np.testing.assert_array_equal(
        again.transform(table[table.columns[::-1]]), encoder.transform(table)
    )


def test_an_unknown_category_is_zero_everywhere() -> None:
    encoder = TableEncoder().fit(machine())
    new = machine(3).assign(line="west")
    found = pd.DataFrame(encoder.transform(new), columns=encoder.names_)
    assert (found[["line=north", "line=south"]] == 0).all(axis=None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"load": np.nan}, r"'load' has 80 missing or infinite value.* in data row 1 \(NaN\)"),
        ({"load": -np.inf}, r"'load' has 80 missing or infinite value.* in data row 1 \(-inf\)"),
        ({"load": "high"}, "'load' must hold numbers, but holds 'high'"),
        ({"line": None}, "'line' has 80 missing"),
    ],
)
def test_wrong_values_name_their_column(change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TableEncoder().fit(machine()).transform(machine().assign(**change))


def test_missing_columns_and_names_as_categories() -> None:
    said = "no column 'heat', which the training table had; did you mean 'Heat'"
    with pytest.raises(UserError, match=said):
        TableEncoder().fit(machine()).transform(machine().rename(columns={"heat": "Heat"}))
    with pytest.raises(UserError, match="'line' holds 80 different texts"):
        TableEncoder(max_categories=79).fit(machine().assign(line=[f"n{i}" for i in range(80)]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.xlsx", b"", "is no table: give a file of type .csv"),
        ("t.csv", b"", "cannot be read as a table"),
        ("t.csv", b"a,b\n", "holds no rows"),
        ("t.parquet", b"PAR1", "cannot be read as a table"),
        ("t.npz", b"PK", "cannot be read as a table"),
    ],
)
def test_wrong_files_are_one_sentence(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_table(tmp_path / name)


def test_an_array_does_not_replace_a_column(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", X=np.zeros((3, 2)), x0=np.arange(3))
    with pytest.raises(UserError, match="two columns named 'x0'"):
        read_table(tmp_path / "t.npz")
    with pytest.raises(UserError, match="method must be one of dagmm, vae, latent_density"):
        fit_table(tmp_path / "t.npz", tmp_path / "run", method="knn")


def test_pickled_arrays_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_table(tmp_path / "a.npy")


@pytest.mark.parametrize("method", ["dagmm", "vae", "latent_density"])
def test_a_fitted_table_finds_broken_rows(method: str, tmp_path: Path) -> None:
    clean, new = tmp_path / "clean.csv", tmp_path / "new.csv"
    machine(300).to_csv(clean, index=False)
    broken = machine(20, seed=1).assign(line="west", heat=30, fault=1)
    pd.concat([machine(40, seed=2).assign(fault=0), broken]).to_csv(new, index=False)
    options = {} if method == "latent_density" else {"epochs": 20}
    fit_table(clean, tmp_path / "d", method=method, options=options, false_alarm_rate=0.02)
    results = score_table(tmp_path / "d", new, labels="fault")
    assert results.summary()["auroc"] > 0.95 and results.names[0] == "1"
    again = score_table(tmp_path / "d", new)
    assert (again.scores == results.scores).all() and "auroc" not in again.summary()
    with pytest.raises(UserError, match="one class only, 0"):
        (tmp_path / "one.csv").write_text(machine(5).assign(fault=0).to_csv(index=False))
        score_table(tmp_path / "d", tmp_path / "one.csv", labels="fault")


def test_labelled_rows_are_left_out_of_the_fit(tmp_path: Path) -> None:
    clean = machine(100)
    mixed = pd.concat([clean.assign(fault=0), machine(50).assign(heat=99, fault=1)])
    clean.to_csv(tmp_path / "a.csv", index=False)
    mixed.to_csv(tmp_path / "b.csv", index=False)
    with pytest.warns(UserWarning, match="too few for a false-alarm rate"):
        first = fit_table(tmp_path / "a.csv", tmp_path / "1", method="latent_density")
        second = fit_table(
            tmp_path / "b.csv", tmp_path / "2", method="latent_density", labels="fault"
        )
    assert first.offset_ == second.offset_


def test_constant_columns_and_wrong_labels_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    machine().assign(site="A", fault="no").to_csv(path, index=False)
    with pytest.raises(UserError, match=r"'site' has the value A in all 80 .* Add --drop site"):
        fit_table(path, tmp_path / "d", drop=["fault"])
    with pytest.raises(UserError, match=r"must be 0 .normal. or 1 .anomaly., not 'no'"):
        fit_table(path, tmp_path / "d", labels="fault")
    with pytest.raises(UserError, match="no column 'falt'; did you mean 'fault'"):
        fit_table(path, tmp_path / "d", labels="falt")
    assert not (tmp_path / "d").exists()


def test_the_summary_is_scikit_learns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=50), rng.normal(size=50)
    results = Results([f"={i}" for i in range(50)], scores, 0.5, labels)
    summary = results.summary()
    assert summary["flagged"] == (scores > 0.5).sum() and summary["items"] == 50
    assert summary["auroc"] == roc_auc_score(labels, scores)
    assert summary["average_precision"] == average_precision_score(labels, scores)
    assert summary["f1"] == f1_score(labels, scores > 0.5)
    results.write(tmp_path / "out", tmp_path / "json" / "r.json")
    assert json.loads((tmp_path / "json" / "r.json").read_text()) == summary
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert (table["score"] == scores).all() and (table["flagged"] == (scores > 0.5)).all()
    assert table["item"][0] == "'=0"  # no formula for a spreadsheet


def test_held_out_items_are_a_share_and_no_training_items() -> None:
    train, clean = held_out(50, 0.2, 0)
    assert len(clean) == 10 and sorted([*train, *clean]) == list(range(50))
    with pytest.raises(UserError, match="2 clean item"):
        held_out(2, 0.5, 0)
