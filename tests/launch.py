"""Commands in processes of their own, under `accelerate launch` as users start them."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.tasks.autoencoder.small import as_flags, small_config

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TQDM_DISABLE": "1",
}
LAUNCHER = (
    "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no"
).split()
PATIENCE = 240.0  # seconds for a process to start, on a machine that has other work


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start this Python with these arguments, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def launch(arguments: list[str], *, processes: int) -> subprocess.Popen[str]:
    """Start a script, or `-m` and a module, under `accelerate launch`."""
    many = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    return start([*LAUNCHER, *many, "--num_processes", str(processes), *arguments])


def train_flags(folder: Path, **changes: object) -> list[str]:
    """A tiny run as the training script and its flags."""
    return [str(ROOT / "train" / "train_kl.py"), *as_flags(small_config(folder, **changes))]


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a success; returns all it printed."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    """Wait until a file is there and not empty, for as long as the process lives."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)
