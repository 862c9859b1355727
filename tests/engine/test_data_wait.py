"""The wait for images, on a clock that the test turns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from latentvae.data import Batch
from latentvae.engine import data_wait as waiting
from latentvae.engine.data_wait import DataWait
from latentvae.engine.log import read_rows
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.task import AutoencoderTask
from tests.tasks.autoencoder.small import small_config


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    monkeypatch.setattr(waiting.os, "cpu_count", lambda: 8)
    return clock


def slow_batches(clock: Clock, seconds: float) -> Iterator[Batch]:
    while True:
        clock.now += seconds
        yield Batch(torch.zeros(1), torch.zeros(1), [])


def test_the_clock_runs_while_a_batch_is_waited_for_but_the_first(clock: Clock) -> None:
    wait = DataWait(slow_batches(clock, 0.5))
    for _ in range(4):
        next(wait)
        clock.now += 10  # the update
    assert wait.take() == 1.5 and wait.take() == 0
    next(wait)
    assert wait.take() == 0.5


@pytest.mark.parametrize(
    ("workers", "processes", "waited", "said"),
    [
        (0, 1, 2.0, "(images 0.2 s, update 0.8 s): try --dataloader_num_workers 1"),
        (0, 1, 7.5, "(images 0.75 s, update 0.25 s): try --dataloader_num_workers 3"),
        (2, 1, 5.0, "50% of the time (images 0.5 s, update 0.5 s): try --dataloader_num_workers 4"),
        (2, 1, 9.9, "99% of the time (images 0.99 s, update 0.01 s): try --data"),
        (
            2,
            4,
            5.0,
            "no cores for more than 2 workers. Better store the images smaller, or try --crops",
        ),
    ],
)
def test_the_warning_has_numbers_and_a_remedy(
    workers: int, processes: int, waited: float, said: str
) -> None:
    wait = DataWait(
        iter(()),
        num_workers=workers,
        num_processes=processes,
        unit=AutoencoderTask.unit,
        advice=AutoencoderTask.data_advice,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting.os, "cpu_count", lambda: 8)
        assert wait.advice(1.9, 10.0, updates=10) is None
        told = wait.advice(waited, 10.0, updates=10)
        assert told is not None and said in told
        assert wait.advice(waited, 10.0, updates=10) is None  # once


@pytest.mark.usefixtures("own_accelerate")
def test_a_run_that_waits_says_so_once_and_logs_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = DataWait.take
    monkeypatch.setattr(DataWait, "take", lambda self: 1000.0 * original(self))
    config: Any = small_config(tmp_path, max_train_steps=4, log_steps=1, validation_steps=9)
    train(config)
    rows = [row for row in read_rows(tmp_path / "log.jsonl") if "images" in row]
    shares = [row["time/data_wait_share"] for row in rows]
    assert len(shares) == 4 and all(share > 0.2 for share in shares)
    assert capsys.readouterr().out.count("the update waits for images") == 1
