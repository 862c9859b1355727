"""An encoding by one and by two processes that are killed again and again."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentvae.cli.main import main
from tests.forks import LIMIT, end_of_ranks, ranks, start_ranks
from tests.latents.conftest import contents
from tests.tiny import spread_vq


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    spread_vq().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    for index in range(120):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index:03d}.png")
    (root / "050.png").write_bytes(b"")
    return root


def encoding(model: Path, data: Path, out: Path) -> Callable[[], None]:
    options = f"--resolution 32 --batch_size 2 --shard_items 2 --out {out}".split()
    return lambda: main(["encode", str(model), "--data", str(data), *options])


def killed(action: Callable[[], None], *, processes: int, out: Path, files: int) -> None:
    """SIGKILL to every process, a moment after so many files are there."""
    output = out.with_suffix(".txt")
    pids = start_ranks(action, output=output, processes=processes)
    deadline = time.monotonic() + LIMIT
    while len(list(out.glob("*"))) < files and time.monotonic() < deadline:
        time.sleep(0.001)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    codes, text = end_of_ranks(pids, output=output)
    assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 0}, text


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_is_one_unbroken_run(
    processes: int, tokenizer: Path, many: Path, tmp_path: Path
) -> None:
    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    output = tmp_path / "output.txt"
    said = ranks(encoding(tokenizer, many, unbroken), output=output, processes=1)
    assert "119 images in 60 shards" in said and "left out 050.png: the file is empty" in said
    draw, again = random.Random(processes), encoding(tokenizer, many, out)
    for files in (1, 30, 70, 110):
        killed(again, processes=processes, out=out, files=files + draw.randrange(10))
        assert not (out / "manifest.json").exists()
    said = ranks(again, output=output, processes=processes)
    assert "119 images in 60 shards" in said
    assert contents(out) == contents(unbroken)
