"""What is learned in equal time: that both arms' speeds are of the same updates."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from latentvae.data import open_source
from latentvae.engine.log import append_row
from latentvae.errors import UserError
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import build_autoencoder_kl

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # where it finds the modules beside it
    yield importlib.import_module("learning")
    sys.path.remove(str(BENCHMARKS))


def test_the_first_updates_of_neither_arm_count(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(_: Any, n: int, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(seconds=[9.0] * 10 + [1.0] * 10 + [4.0] * (n - 20))

    def train(_: Any, n: int, *, out: Path, **__: Any) -> None:
        out.mkdir()
        for update in range(10, n + 1, 10):
            speed = script.BATCH / {10: 9.0, 20: 1.0}.get(update, 4.0)
            append_row(out / "log.jsonl", {"update": update, "time/images_per_second": speed})

    monkeypatch.setattr(script.Arms, "_reference", trained)
    monkeypatch.setattr(script.Arms, "_train", train)
    options = script.Options(
        data="samples", validation_data="samples", out=tmp_path, speed_updates=40
    )
    arms = script.Arms(options)
    assert arms.speed("reference") == arms.speed("latentvae") == 3.0
    with pytest.raises(UserError, match="at least 20"):
        script.run(replace(options, speed_updates=19))


def test_every_update_of_the_reference_is_timed(script: ModuleType) -> None:
    torch.manual_seed(0)
    trained = script.train_reference(
        build_autoencoder_kl(block_out_channels=(8, 8), norm_num_groups=4),
        open_source("samples", split="train"),
        PerceptualLoss(load_lpips("alex")),
        resolution=32,
        batch_size=1,
        updates=3,
        learning_rate=1e-4,
        warmup=1,
        seed=0,
    )
    assert len(trained.seconds) == 3 and min(trained.seconds) > 0
