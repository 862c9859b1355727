"""Which signals stop a run cleanly, and which at once."""

import os
import signal

import pytest
from torch.utils.data import DataLoader

from latentvae.data.workers import leave_signals_to_the_trainer
from latentvae.engine import signals as interrupt
from latentvae.engine.signals import Interrupt


def test_a_signal_that_a_launcher_passes_on_again_counts_once() -> None:
    """SLURM signals every process of a step, and the launcher among them the others once more."""
    with Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGUSR1


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_ECHO", -1.0)
    with Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.value.code == 128 + signal.SIGINT


def test_workers_of_the_loader_survive_slurms_signal() -> None:
    loader = DataLoader(
        list(range(9)),  # type: ignore[arg-type]
        batch_size=1,
        num_workers=1,
        worker_init_fn=leave_signals_to_the_trainer,
    )
    batches = iter(loader)
    seen = [int(next(batches))]
    for worker in batches._workers:  # type: ignore[attr-defined]
        os.kill(worker.pid, signal.SIGUSR1)
    assert seen + [int(batch) for batch in batches] == list(range(9))
