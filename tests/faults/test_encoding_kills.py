"""Kills of real processes: one, and two under `accelerate launch`."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.latents.conftest import contents

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TQDM_DISABLE": "1",
}
LAUNCH = (
    "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--multi_gpu --main_process_port 0 --num_processes"
).split()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    for index in range(120):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index:03d}.png")
    (root / "050.png").write_bytes(b"")
    return root


def start(model: Path, data: Path, out: Path, *, processes: int = 1) -> subprocess.Popen[str]:
    launch = [*LAUNCH, str(processes)] if processes > 1 else []
    options = f"--resolution 32 --batch_size 2 --shard_items 2 --out {out}".split()
    command = [*launch, "-m", "latentvae.cli", "encode", str(model), "--data", str(data), *options]
    return subprocess.Popen(
        [sys.executable, *command],
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


def kill_after(process: subprocess.Popen[str], out: Path, files: int, delay: float) -> None:
    """SIGKILL to every process of the launch, a moment after so many files are there."""
    while len(list(out.glob("*"))) < files:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    time.sleep(delay)
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_is_one_unbroken_run(
    processes: int, tokenizer: Path, many: Path, tmp_path: Path
) -> None:
    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    said = finish(start(tokenizer, many, unbroken))
    assert "119 images in 60 shards" in said and "left out 050.png: the file is empty" in said
    draw = random.Random(processes)
    for files in (1, 30, 70, 110):
        process = start(tokenizer, many, out, processes=processes)
        kill_after(process, out, files + draw.randrange(10), draw.random() / 20)
        assert not (out / "manifest.json").exists()
    said = finish(start(tokenizer, many, out, processes=processes))
    assert "119 images in 60 shards" in said
    assert contents(out) == contents(unbroken)
