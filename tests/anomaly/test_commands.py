"""The commands `latentvae anomaly fit` and `score` on tables, and their errors."""

import json
from pathlib import Path

import pytest

from latentvae.cli.main import main
from tests.anomaly.test_tables import machine


@pytest.fixture
def files(tmp_path: Path) -> Path:
    machine(300).to_csv(tmp_path / "clean.csv", index=False)
    broken = machine(60, seed=1).assign(fault=0)
    broken.loc[:9, ["heat", "fault"]] = [40.0, 1]
    broken.to_csv(tmp_path / "new.csv", index=False)
    (tmp_path / "photos").mkdir()
    return tmp_path


def test_a_table_is_fitted_and_scored(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["anomaly", "fit", "--data", str(files / "clean.csv"), "--out", str(files / "d")]
    main([*fit, "--method", "latent_density", "--false_alarm_rate", "0.05"])
    said = capsys.readouterr()
    assert "learned from 240 rows or images, 60 held out" in said.out and "rate of 0.05" in said.out
    assert said.err == ""

    score = ["anomaly", "score", str(files / "d"), "--data", str(files / "new.csv")]
    main([*score, "--out", str(files / "o"), "--json", str(files / "r.json"), "--labels", "fault"])
    summary = json.loads((files / "r.json").read_text())
    assert summary["items"] == 60 and summary["auroc"] == 1 and 10 <= summary["flagged"] <= 18
    assert "auroc 1.0000" in capsys.readouterr().out
    lines = (files / "o" / "scores.csv").read_text().splitlines()
    assert lines[0] == "item,score,flagged,label" and len(lines) == 61
    main([*score, "--out", str(files / "o"), "--json", str(files / "r.json")])
    assert set(json.loads((files / "r.json").read_text())) == {"items", "threshold", "flagged"}


def test_few_held_out_rows_are_a_warning_of_one_line(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["anomaly", "fit", "--data", str(files / "clean.csv"), "--out", str(files / "d")]
    main([*fit, "--method", "latent_density", "--false_alarm_rate", "0.001"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 60 clean rows are too few for a false-alarm rate of 0.001")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--data", "photos"], "needs an autoencoder: give --model"),
        (["fit", "--data", "photos", "--method", "vae"], "--method vae is not for a folder"),
        (["fit", "--data", "clean.csv", "--method", "positions"], "is not for a table"),
        (["fit", "--data", "clean.csv", "--model", "x"], "--model is for folders of images"),
        (["fit", "--data", "claen.csv"], "did you mean 'clean.csv'"),
        (["fit", "--data", "clean.csv", "--epochs", "0"], "epochs must be at least 1 (got 0)"),
        (["fit", "--data", "clean.csv", "--drop", "laod"], "did you mean 'load'"),
        (["fit", "--data", "clean.csv", "--held_out", "1.5"], "between 0 and 1 (got 1.5)"),
        (["score", "photos", "--data", "new.csv"], "holds no detector"),
        (["fitt", "--data", "clean.csv"], "did you mean 'anomaly fit'"),
    ],
)
def test_wrong_arguments_end_with_code_2(
    arguments: list[str],
    said: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as ended:
        main(["anomaly", *arguments, "--out", "d"])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (files / "d").exists()


def test_help_of_the_group_lists_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["anomaly", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "anomaly fit" in said and "anomaly score" in said
