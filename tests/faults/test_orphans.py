"""Nothing lives on whose parent was killed: readers without their trainer, trainers without their
launcher."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from latentvae.engine.checkpoint_files import newest_usable
from latentvae.tasks.autoencoder import train
from tests.forks import start_fork
from tests.launch import PATIENCE, launch, train_flags, wait_for
from tests.tasks.autoencoder.small import small_config

WORKERS = 2
READERS_END = 20.0  # seconds; they look for their trainer every 5
TRAINERS_END = 60.0  # the update in hand and a save


@pytest.fixture
def options() -> dict[str, object]:
    return {
        "train_batch_size": 2,
        "max_train_steps": 4000,
        "checkpointing_steps": 4000,
        "validation_steps": 4000,
        "log_steps": 1,
        "dataloader_num_workers": WORKERS,
    }


def below(process: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """All that a launch has started, once it trains. The first row is of the untrained network."""
    log, deadline = folder / "log.jsonl", time.monotonic() + PATIENCE
    wait_for(process, log)
    while "loss/rec" not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return psutil.Process(process.pid).children(recursive=True)


def ended(family: list[psutil.Process], *, seconds: float) -> None:
    _, alive = psutil.wait_procs(family, timeout=seconds)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.slow
def test_readers_end_with_a_trainer_that_was_killed(
    tmp_path: Path, options: dict[str, object]
) -> None:
    config, output = small_config(tmp_path / "run", **options), tmp_path / "output.txt"
    trainer = psutil.Process(start_fork(lambda: train(config), output=output))
    deadline, log = time.monotonic() + PATIENCE, tmp_path / "run" / "log.jsonl"
    try:
        while not log.exists() or "loss/rec" not in log.read_text():  # its first update is made
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        readers = trainer.children()
        assert len(readers) >= WORKERS
    finally:
        trainer.kill()
        trainer.wait()
    ended(readers, seconds=READERS_END)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_trainers_save_and_end_with_a_launcher_that_was_killed(
    tmp_path: Path, processes: int, options: dict[str, object]
) -> None:
    process = launch(train_flags(tmp_path, **options), processes=processes)
    family = below(process, tmp_path)
    process.kill()
    ended(family, seconds=TRAINERS_END)
    assert len(family) >= processes * (1 + WORKERS)
    assert newest_usable(tmp_path)[0] is not None
