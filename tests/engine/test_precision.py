"""`mixed_precision auto`: the fastest precision of the machine, and the same one on resume."""

import contextlib
from pathlib import Path

import pytest
import torch

from latentvae.engine import processes
from latentvae.engine.resume import read_config, settle_precision, write_config
from latentvae.errors import UserError
from latentvae.tasks.autoencoder import TrainConfig, train
from tests.engine.regression import RegressionConfig
from tests.tasks.autoencoder.small import small_config


def _config(precision: str | None, **run: object) -> RegressionConfig:
    return RegressionConfig().with_changes({"run": {"mixed_precision": precision, **run}})


def _machine(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    monkeypatch.setattr(processes, "multiplies_bfloat16", lambda device: bfloat16)


@pytest.mark.parametrize(("bfloat16", "precision"), [(True, "bf16"), (False, "no")])
def test_the_machine_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bfloat16: bool, precision: str
) -> None:
    _machine(monkeypatch, bfloat16=bfloat16)
    settled = settle_precision(_config("auto"), tmp_path)
    assert settled.run.mixed_precision == precision
    assert processes.start_accelerator(_config("auto").run, tmp_path).mixed_precision == precision


def test_a_training_writes_its_choice_into_the_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _machine(monkeypatch, bfloat16=True)
    train(small_config(tmp_path, mixed_precision="auto", max_train_steps=1))
    assert read_config(tmp_path / "config.yaml", TrainConfig).run.mixed_precision == "bf16"


def test_a_precision_that_the_user_gives_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _machine(monkeypatch, bfloat16=True)
    for precision in ("no", None):
        settled = settle_precision(_config(precision), tmp_path)
        assert settled.run.mixed_precision == precision


def test_a_resumed_run_keeps_its_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _machine(monkeypatch, bfloat16=True)
    first = settle_precision(_config("auto"), tmp_path)
    write_config(first, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml", RegressionConfig).run.mixed_precision == "bf16"

    # a run of the launcher's precision keeps that
    write_config(_config(None), tmp_path / "config.yaml")
    assert settle_precision(_config("auto"), tmp_path).run.mixed_precision is None
    write_config(first, tmp_path / "config.yaml")

    # on another machine
    _machine(monkeypatch, bfloat16=False)
    resumed = settle_precision(_config("auto"), tmp_path)
    assert resumed.run.mixed_precision == "bf16"
    fresh = _config("auto", overwrite_output_dir=True)
    assert settle_precision(fresh, tmp_path).run.mixed_precision == "no"


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(processes, "multiplies_bfloat16", asked.append)
    monkeypatch.setattr(processes, "launched_device", lambda: "cuda:1")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    processes.fastest_precision()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    processes.fastest_precision()
    assert [str(device) for device in asked] == ["cuda:1", "cpu"]


def test_ranks_that_choose_differently_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "gather_objects", lambda mine: [mine, "bf16"])
    with pytest.raises(UserError, match=r"different precisions \(bf16 and no\)"):
        processes.start_accelerator(_config("no").run, tmp_path)
