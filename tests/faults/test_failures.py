"""What ends a run that was started rightly: one sentence, exit code 1, nothing lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from latentvae.cli import train as command_line
from latentvae.data import ImageStream
from latentvae.data.workers import leave_signals_to_the_trainer
from latentvae.engine import checkpoint_files as saving
from latentvae.engine.checkpoint_files import checkpoints, newest_usable
from latentvae.engine.failures import explanation
from latentvae.engine.lock import LOCK_NAME, locked
from latentvae.engine.updates import Updates
from latentvae.errors import RunError, UserError
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.images import open_data
from latentvae.tasks.autoencoder.task import AutoencoderTask
from tests.tasks.autoencoder.small import as_flags, small_config

pytestmark = pytest.mark.usefixtures("own_accelerate")


def test_a_full_disk_is_one_sentence_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = saving.save_file

    def full(tensors: Any, path: Path) -> None:
        if "checkpoint-4" in str(path) and "average" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_file", full)
        with pytest.raises(RunError, match=r"the disk is full .* MiB free"):
            train(small_config(tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert newest_usable(tmp_path)[1] == [] and not list(tmp_path.glob("*.tmp-*"))
    assert train(small_config(tmp_path)).is_dir()


def test_out_of_memory_names_numbers_and_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Updates, "micro_step", out_of_memory)
    flags = as_flags(small_config(tmp_path))
    with pytest.raises(SystemExit) as ended:
        command_line.run_training(flags, description="")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "train_batch_size 4 at 32 x 32 px" in said
    assert "--train_batch_size 2 --gradient_accumulation_steps 4" in said
    assert "--gradient_checkpointing" in said and "--mixed_precision bf16" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EDQUOT, "quota", "a/b"), "'a/b' cannot be written: the disk is full"),
        (OSError(errno.EROFS, "read-only", "a/b"), "cannot be read or written any more (EROFS)"),
        (RuntimeError("I/O error: No space (os error 28)"), "the disk is full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "(pid 7)"),
        (RuntimeError("Timed out waiting 8000ms for recv"), "ddp_timeout 1800 s"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
)
def test_what_the_machine_does_is_explained(error: Exception, said: str, tmp_path: Path) -> None:
    assert said in str(explanation(error, AutoencoderTask(small_config(tmp_path))))


def test_a_fault_of_our_own_keeps_its_traceback(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), KeyError("x"), OSError("odd")):
        assert explanation(error, AutoencoderTask(small_config(tmp_path))) is None


def test_a_reader_that_is_killed_ends_the_run_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Updates.micro_step

    def killing(self: Updates, *args: Any) -> Any:
        for child in psutil.Process().children():
            child.kill()
        return original(self, *args)

    monkeypatch.setattr(Updates, "micro_step", killing)
    config = small_config(tmp_path, dataloader_num_workers=1, max_train_steps=40)
    with pytest.raises(RunError, match=r"a process that reads images .* was killed"):
        train(config)
    left = [child.status() for child in psutil.Process().children()]
    assert set(left) <= {psutil.STATUS_ZOMBIE}  # until the exception is forgotten


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    holder = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from latentvae.engine.lock import locked
        with locked(Path({str(tmp_path)!r})):
            print("held", flush=True)
            time.sleep(60)
    """)
    first = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by process {first.pid} on .*\. Wait until"):
            train(small_config(tmp_path, max_train_steps=1))
        assert not (tmp_path / "config.yaml").exists()
    finally:
        first.kill()  # which releases it: no lock is stale
        first.wait()
    assert (tmp_path / LOCK_NAME).is_file()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_lock_leaves_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a checkpoint of"):
        train(small_config(tmp_path / "new", resume_from_checkpoint="checkpoint-2"))
    assert not (tmp_path / "new").exists()


def _numbers() -> Iterator[Any]:
    loader = DataLoader(
        list(range(9)),  # type: ignore[arg-type]
        batch_size=1,
        num_workers=1,
        worker_init_fn=leave_signals_to_the_trainer,
    )
    return iter(loader)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs the sender of a signal")
def test_readers_outlive_a_sigterm_that_is_not_the_trainers() -> None:
    batches = _numbers()
    seen = [int(next(batches))]
    (worker,) = batches._workers  # type: ignore[attr-defined]
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    time.sleep(0.2)
    assert seen + [int(batch) for batch in batches] == list(range(9))


def test_readers_end_by_the_trainers_sigterm() -> None:
    batches = _numbers()
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(timeout=10)
    assert not worker.is_alive()
    batches._shutdown_workers()  # type: ignore[attr-defined]


def test_a_skipped_update_names_its_terms_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Updates.micro_step

    def poisoned(self: Updates, batch: Any, *args: Any) -> Any:
        if self.progress.update == 1:
            batch = batch._replace(images=torch.full(batch.images.shape, float("nan")))
        return original(self, batch, *args)

    monkeypatch.setattr(Updates, "micro_step", poisoned)
    train(small_config(tmp_path, max_train_steps=3))
    (line,) = [row for row in capsys.readouterr().out.splitlines() if "skipped: its" in row]
    assert line.startswith("update 2 skipped") and "loss/rec" in line and "loss/lpips" in line
    images = open_data(small_config(tmp_path))[0]
    assert not isinstance(images, ImageStream)
    names = {images.name(i) for i in range(len(images))}
    assert any(name in line for name in names)
