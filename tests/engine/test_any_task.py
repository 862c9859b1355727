"""A task that only says what it trains gets the rest from the engine: exact resume after a kill,
the log, the lock, signals, the weight average and `verify-resume`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentvae.cli.train import run_task
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.lock import LOCK_NAME, locked
from latentvae.engine.log import read_rows
from latentvae.engine.loop import Stopped, train
from latentvae.engine.updates import Updates
from latentvae.errors import RunError, UserError
from latentvae.proofs.verify_resume import verify_resume
from tests.engine.regression import Regression, RegressionConfig

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
}


class Killed(BaseException):
    """Stands in for SIGKILL: nothing may catch it."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 3))
    y = np.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:]
    path = tmp_path_factory.mktemp("table") / "table.csv"
    np.savetxt(path, np.hstack([x, y]), delimiter=",")
    return path


def config(table: Path, folder: Path, **changes: Any) -> RegressionConfig:
    """Twelve updates of two micro-steps, over epochs of five batches."""
    run = {
        "output_dir": str(folder),
        "max_train_steps": 12,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "checkpointing_steps": 4,
        "validation_steps": 6,
        "log_steps": 2,
        **changes,
    }
    values = {"regression": {"table": str(table)}, "run": run}
    return RegressionConfig.model_validate(values)


@pytest.fixture(scope="module")
def straight(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regression") / "straight"
    train(Regression(config(table, folder)))
    return folder


def left(folder: Path) -> tuple[Any, Any, Any]:
    """All that a run leaves behind, but for times."""
    snapshot = load_checkpoint(folder / "checkpoint-12")
    tensors = {f"{f}/{n}": v for f, values in snapshot.tensors.items() for n, v in values.items()}
    tensors |= load_file(folder / "export" / "net.safetensors")
    rows = [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_rows(folder / "log.jsonl")
    ]
    return snapshot.values, {name: value.tolist() for name, value in tensors.items()}, rows


def test_it_learns_logs_and_exports_the_average(straight: Path) -> None:
    rows = read_rows(straight / "log.jsonl")
    assert [row["update"] for row in rows if "loss/mse" in row] == [2, 4, 6, 8, 10, 12]
    assert rows[1]["rows"] == 2 * 16 and "time/rows_per_second" in rows[1]
    errors = [row["validation/mse"] for row in rows if "validation/mse" in row]
    assert len(errors) == 3 and errors[2] < errors[1] < errors[0]  # the first before any update
    tensors = load_checkpoint(straight / "checkpoint-12").tensors
    assert tensors.keys() == {"model", "model_optimizer", "model_average"}
    exported = load_file(straight / "export" / "net.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, tensors["model_average"][name]), name
        assert not torch.equal(value, tensors["model"][name]), name


@pytest.mark.parametrize(("update", "micro_step"), [(2, 1), (5, 0), (8, 1), (12, 1)])
def test_killed_anywhere_it_ends_as_if_it_never_was(
    table: Path,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    update: int,
    micro_step: int,
) -> None:
    original = Updates.micro_step

    def killing(self: Updates, batch: Any) -> Any:
        done = 2 * (update - 1) + micro_step
        if self.progress.micro_step == done:
            raise Killed
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Updates, "micro_step", killing)
        with pytest.raises(Killed):
            train(Regression(config(table, tmp_path)))
    train(Regression(config(table, tmp_path)))
    assert left(tmp_path) == left(straight)


def test_a_signal_finishes_the_update_and_saves(
    table: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Updates.micro_step

    def signalling(self: Updates, batch: Any) -> Any:
        if self.progress.micro_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Updates, "micro_step", signalling)
        with pytest.raises(Stopped, match="checkpoint-5"):
            train(Regression(config(table, tmp_path)))
    train(Regression(config(table, tmp_path)))
    values, tensors, rows = left(tmp_path)
    assert (values, tensors) == left(straight)[:2]
    assert rows == left(straight)[2]


def test_a_gradient_that_is_not_finite_is_skipped(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Updates.micro_step

    def poisoned(self: Updates, batch: Any) -> Any:
        spoil = self.progress.update in (1, 3, 4)
        return original(self, batch * float("nan") if spoil else batch)

    monkeypatch.setattr(Updates, "micro_step", poisoned)
    options = config(table, tmp_path)
    options.optimizer.max_skipped_updates = 2
    with pytest.raises(RunError, match=r"2 updates in a row .* The last skipped update is 5"):
        train(Regression(options))
    progress = load_checkpoint(tmp_path / "checkpoint-4").values["progress"]
    assert progress["skipped"] == 2


def test_a_folder_in_use_is_refused(table: Path, tmp_path: Path) -> None:
    script = """
import fcntl, json, os, sys, time
file = open(sys.argv[1], "w+")
fcntl.lockf(file, fcntl.LOCK_EX)
print(json.dumps({"process": os.getpid(), "host": "there"}), file=file, flush=True)
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", script, str(tmp_path / LOCK_NAME)],
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is in use by process {other.pid} on there"):
            train(Regression(config(table, tmp_path)))
        other.kill()
    with locked(tmp_path):
        pass


def test_other_options_and_another_table_are_refused(
    table: Path, straight: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train_batch_size \(8 then, 4 now\)"):
        train(Regression(config(table, straight, train_batch_size=4)))
    shorter = tmp_path / "shorter.csv"
    shorter.write_text("".join(table.read_text().splitlines(keepends=True)[:30]))
    options = config(table, straight, max_train_steps=14)
    (straight / "config.yaml").write_text(
        (straight / "config.yaml").read_text().replace(str(table), str(shorter))
    )
    options.regression.table = str(shorter)
    with pytest.raises(UserError, match=r"rows: 40 then, 30 now"):
        train(Regression(options))


@pytest.mark.slow
def test_verify_resume_holds_for_it(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    report = tmp_path / "checks.json"
    options = config(table, tmp_path / "run")
    code = verify_resume(Regression, options, updates=40, kills=1, json=report)
    checks = {check["name"]: check for check in json.loads(report.read_text())["checks"]}
    assert code == 0 and {"model", "model's optimizer", "model's average"} <= checks.keys()
    assert checks["data order"]["passed"] and checks["log rows"]["passed"]


def test_a_wrong_flag_is_told_in_its_own_terms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_task(Regression, ["--tabel", "x.csv"], description="Fit a table.")
    assert ended.value.code == 2
    assert "unknown option '--tabel'; did you mean '--table'?" in capsys.readouterr().err
