"""A gradient that is not finite changes nothing but a counter; several in a row end the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentvae.engine.checkpoint_files import load_checkpoint, newest_usable
from latentvae.engine.updates import Updates
from latentvae.tasks.autoencoder import train
from tests.tasks.autoencoder.recording import recorded
from tests.tasks.autoencoder.small import small_config

Spoil = Callable[[str, set[int], float], None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Put one value into the gradient of ``part`` in the given updates (from 1)."""

    def put(part: str, updates: set[int], value: float) -> None:
        original = Updates.micro_step

        def spoiling(self: Updates, *args: Any) -> Any:
            logged = original(self, *args)
            if self.progress.update + 1 in updates:
                module: Any = getattr(self.training.task, part)
                grads = [p.grad for p in module.parameters() if p.grad is not None]
                grads[-1].view(-1)[0] = value
            return logged

        monkeypatch.setattr(Updates, "micro_step", spoiling)

    return put


@pytest.mark.parametrize(
    ("part", "value"),
    [("wrapper", float("nan")), ("discriminator", float("inf")), ("wrapper", 3e38)],
)
def test_the_update_is_skipped_and_counted_and_the_run_goes_on(
    tmp_path: Path, spoil: Spoil, capsys: pytest.CaptureFixture[str], part: str, value: float
) -> None:
    spoil(part, {2, 4}, value)
    config = small_config(
        tmp_path, disc_start=0, max_train_steps=4, log_steps=1, validation_steps=9
    )
    with recorded() as recording:
        train(config)

    # compare the weights before and after each update
    for number, update in enumerate(recording.updates, start=1):
        if number in (2, 4):
            assert update.norm is None and update.before.keys() == update.after.keys()
            for name, before in update.before.items():
                assert torch.equal(before, update.after[name]), (number, name)
        else:
            same = [n for n, v in update.before.items() if torch.equal(v, update.after[n])]
            assert not same, (number, same)

    # skipped updates in the log, the average and the terminal
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    skipped = [row["optimizer/skipped"] for row in rows if "optimizer/skipped" in row]
    assert skipped == [0, 1, 1, 2]
    assert recording.training.averages["model"].optimization_step == 2
    text = capsys.readouterr().out
    assert text.count("skipped: its gradient is not finite") == 2

    # skipped updates in the checkpoint
    checkpoint, _ = newest_usable(tmp_path)
    assert checkpoint is not None
    values = load_checkpoint(checkpoint).values["progress"]
    assert (values["update"], values["skipped"], values["skipped_in_a_row"]) == (4, 2, 1)


def test_several_in_a_row_end_the_run_and_leave_the_checkpoint(
    tmp_path: Path, spoil: Spoil
) -> None:
    spoil("wrapper", {1, 3, 4, 5}, float("nan"))
    config = small_config(tmp_path, max_skipped_updates=3)
    with pytest.raises(RuntimeError, match=r"3 updates in a row .* The last skipped update is 5"):
        train(config)
    checkpoint, faults = newest_usable(tmp_path)
    assert checkpoint is not None and checkpoint.name == "checkpoint-4" and not faults
    tensors = load_checkpoint(checkpoint).tensors
    assert all(v.isfinite().all() for group in tensors.values() for v in group.values())
    assert not (tmp_path / "export").exists()


def test_a_loss_that_is_not_finite_does_not_spoil_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line stays JSON, and the means are of the updates that were made."""
    original = Updates.micro_step

    def poisoned(self: Updates, batch: Any) -> Any:
        if self.progress.update == 1:
            batch = batch._replace(images=batch.images * float("nan"))
        return original(self, batch)

    monkeypatch.setattr(Updates, "micro_step", poisoned)
    train(small_config(tmp_path, max_train_steps=4, log_steps=2, validation_steps=9))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    rows = [row for row in rows if "loss/rec" in row]
    assert rows[0]["optimizer/skipped"] == 1 and rows[0]["loss/rec"] > 0
