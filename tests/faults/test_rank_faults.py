"""One of two processes dies, raises, leaves or hangs: both end, in words, and nothing is lost."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from latentvae.engine.checkpoint_files import newest_usable
from tests.launch import launch, wait_for
from tests.tasks.autoencoder.small import as_flags, small_config

TIMEOUT = 20  # --ddp_timeout, in seconds, which is the time of the one that hangs
# After the fault: the launcher asks every half second, ends the others by SIGTERM, and after 30 s,
# for one that hangs in the middle of an update, by SIGKILL.
LIMIT = {"dead": 20, "raising": 20, "exiting": 20, "hanging": TIMEOUT + 45}
SLACK = 30.0  # of a machine that has other work


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIMIT)
def test_one_process_goes_wrong_and_both_end_in_words(kind: str, tmp_path: Path) -> None:
    flags = as_flags(
        small_config(
            tmp_path,
            train_batch_size=2,
            max_train_steps=400,
            checkpointing_steps=1,
            checkpoints_total_limit=2,
            validation_steps=400,
            ddp_timeout=TIMEOUT,
        )
    )

    # start both processes, and wait until they end
    process = launch(["-m", "tests.faults.faulty", kind, *flags], processes=2)
    family: list[psutil.Process] = []
    try:
        wait_for(process, tmp_path / "checkpoint-2" / "manifest.json")
        start = time.monotonic()
        family = psutil.Process(process.pid).children(recursive=True)
        text, _ = process.communicate(timeout=LIMIT[kind] + SLACK)
        print(f"{kind}: {time.monotonic() - start:.1f} s after the fault\n{text}")
        assert process.returncode != 0
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    finally:
        for member in [*family, psutil.Process()]:
            if member.pid != psutil.Process().pid and member.is_running():
                member.send_signal(signal.SIGKILL)
        process.kill()
        process.wait()

    # check what they printed
    ours = "another process of this run has ended, or has hung" in text
    # The launcher may end the other one before that has said so, and then says itself what it saw.
    said = {"dead": "Signal 9 (SIGKILL)", "raising": "ZeroDivisionError: a fault of process 1"}
    assert said[kind] in text if kind in said else ours, text

    # check the checkpoint
    found, faults = newest_usable(tmp_path)
    assert found == tmp_path / "checkpoint-2" and not faults
