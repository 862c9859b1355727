"""Two ranks are one process with the joined batch, and kills of real processes change nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from latentvae.tasks.autoencoder.kl_control import DAMPING
from tests.tasks.autoencoder.small import as_flags, small_config
from tests.tasks.autoencoder.test_resume import tensors

ROOT = Path(__file__).parents[3]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
ENVIRONMENT = {
    **os.environ,
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TQDM_DISABLE": "1",
}


def launch(arguments: list[str], *, processes: int) -> subprocess.Popen[str]:
    many = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    command = [
        *ACCELERATE,
        *many,
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def train_flags(folder: Path, **changes: object) -> list[str]:
    return [str(ROOT / "train" / "train_kl.py"), *as_flags(small_config(folder, **changes))]


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["fixed", "adaptive", "held"])
def test_gradients_of_two_ranks_equal_one_process_with_the_joined_batch(
    tmp_path: Path, weight: str
) -> None:
    script = str(ROOT / "tests" / "training" / "ranks.py")
    finish(launch([script, str(tmp_path / "two"), "3", weight], processes=2))
    finish(launch([script, str(tmp_path / "one"), "6", weight], processes=1))
    one = equal_ranks(tmp_path)
    assert {
        "model/output_logvar",
        "model/net.decoder.conv_out.weight",
        "critic/layers.0.weight",
    } <= one.keys()
    log_factor = one["progress/kl_log_factor"].item()
    # After one update by the rate, 1, and the damping; as much as that if the error is clipped.
    assert 0.1 < abs(log_factor) < 0.9 * (1.0 + DAMPING) if weight == "held" else log_factor == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["average", "entropy", "lfq"])
def test_a_codebook_of_two_ranks_is_that_of_one_process_with_the_joined_batch(
    tmp_path: Path, quantizer: str
) -> None:
    script = str(ROOT / "tests" / "training" / "ranks.py")
    finish(launch([script, str(tmp_path / "two"), "3", "fixed", quantizer], processes=2))
    finish(launch([script, str(tmp_path / "one"), "6", "fixed", quantizer], processes=1))
    one = equal_ranks(tmp_path)
    expected = {"average": "buffer/embed_sum", "entropy": "model/net.quantize.weight", "lfq": ""}
    assert not expected[quantizer] or expected[quantizer] in one


def equal_ranks(folder: Path) -> dict[str, torch.Tensor]:
    """What one process saved; two ranks saved the same, to rounding, and equal to each other."""
    one = load_file(folder / "one-0.safetensors")
    first, second = (load_file(folder / f"two-{rank}.safetensors") for rank in (0, 1))
    assert one.keys() == first.keys() == second.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        scale = value.abs().max().clamp(min=1e-4)  # the critic's last bias has a gradient of zero
        torch.testing.assert_close(first[name] / scale, value / scale, rtol=0, atol=1e-4, msg=name)
    return one


def kill_after(process: subprocess.Popen[str], file: Path, delay: float) -> None:
    """SIGKILL the launcher and all its workers some time after ``file`` is there."""
    deadline = time.monotonic() + 240
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    time.sleep(delay)
    launcher = psutil.Process(process.pid)
    family = [*launcher.children(recursive=True), launcher]  # workers have sessions of their own
    for member in family:
        member.send_signal(signal.SIGSTOP)
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_processes_go_on_to_the_bit(tmp_path: Path, processes: int) -> None:
    options = {
        "train_batch_size": 4 // processes,
        "max_train_steps": 24,
        "checkpointing_steps": 5,
        "validation_steps": 12,
    }
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(launch(train_flags(straight, **options), processes=processes))
    for update, delay in ((5, 0.9), (15, 0.1)):
        process = launch(train_flags(killed, **options), processes=processes)
        kill_after(process, killed / f"checkpoint-{update}" / "manifest.json", delay)
        assert not (killed / "export").exists()
    finish(launch(train_flags(killed, **options), processes=processes))
    left, right = tensors(straight / "export"), tensors(killed / "export")
    assert left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )
    left, right = tensors(straight / "checkpoint-24"), tensors(killed / "checkpoint-24")
    assert left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "to"), [(1, "launcher"), (1, "group"), (2, "launcher")])
def test_sigterm_finishes_the_update_saves_and_ends(
    tmp_path: Path, processes: int, to: str
) -> None:
    options = {
        "train_batch_size": 4 // processes,
        "max_train_steps": 400,
        "checkpointing_steps": 400,
        "validation_steps": 400,
        "log_steps": 1,
        "dataloader_num_workers": 1 if to == "group" else 0,
    }
    process = launch(train_flags(tmp_path, **options), processes=processes)
    deadline = time.monotonic() + 240
    while not (tmp_path / "log.jsonl").exists() or (tmp_path / "log.jsonl").stat().st_size == 0:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if to == "launcher":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGTERM)
    while not list(tmp_path.glob("checkpoint-*/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "the same command goes on from there" in text
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_launch_that_starts_fewer_ranks_than_asked_is_an_error(tmp_path: Path) -> None:
    command = [
        *ACCELERATE,
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    done = subprocess.run(
        [*command, *train_flags(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
    )
    assert done.returncode != 0 and "asked for several processes and started one" in done.stderr
    assert not list(tmp_path.iterdir())
