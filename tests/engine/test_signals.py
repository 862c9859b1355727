"""Which signals stop a run cleanly, and which at once."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader

from latentvae.data.workers import leave_signals_to_the_trainer
from latentvae.engine import signals as interrupt
from latentvae.engine.signals import Interrupt


@pytest.fixture(autouse=True)
def _not_under_nohup() -> Iterator[None]:
    """The tests may run in a process that ignores SIGHUP."""
    if not hasattr(signal, "SIGHUP"):
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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


def test_a_signal_is_acknowledged_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupt(lambda: 1234):
        os.kill(os.getpid(), signal.SIGINT)
        assert "finishing update 1,234, then saving" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)  # repeated by a launcher: nothing new to say
        assert capfd.readouterr().err == ""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_stops_cleanly_and_never_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_ECHO", -1.0)
    with Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == signal.SIGHUP
        os.kill(os.getpid(), signal.SIGHUP)
    with Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == signal.SIGINT


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_under_nohup_a_closed_terminal_changes_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_output_to_a_closed_terminal_is_no_error() -> None:
    """A child process on a terminal of its own, which the test closes."""
    import pty

    child, terminal = pty.fork()
    if child == 0:
        signal.alarm(60)  # no orphan if the signal does not come
        with Interrupt() as stop:
            os.write(1, b"ready\n")
            while not stop.requested:
                time.sleep(0.01)
            os.write(1, b"saving\n")
        os._exit(7)
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
