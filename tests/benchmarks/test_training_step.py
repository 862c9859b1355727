"""The benchmark of the update: that its references are the same mathematics, and that it would
notice if they were not."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from torch import nn

from latentvae.compute.upsampling import FoldedUpsample2D
from latentvae.compute.winograd.convolutions import TrainedWinogradConv2d
from tests.benchmarks.processes import this_process

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--resolution", "32", "--batch_size", "1", "--channels", "32", "32"]
TINY += ["--disc_channels", "16", "--runs", "1", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def own_accelerate() -> Iterator[None]:
    """Accelerate as in a new process: it keeps the first run's precision."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # where it and its processes find the modules beside it
    yield importlib.import_module("training_step")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-4), ("bf16", 0.2)])
def test_rows_of_each_script_and_their_equality(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    within: float,
) -> None:
    monkeypatch.setattr(script, "own_process", this_process)
    file = tmp_path / "rows.json"
    arguments = [*TINY, "--precision", precision, "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["training_step.py", *arguments])
    script.main()
    rows = json.loads(file.read_text())["rows"]
    names = ["diffusers as-is", "diffusers mended", "taming"]
    assert [row["name"] for row in rows] == [f"{precision}, 32 px, batch 1, {n}" for n in names]
    for row in rows:
        assert 0 < row["equal_within"] < within
        assert row["ratio_median"] == pytest.approx(row["reference"] / row["ours"])


@pytest.mark.slow
def test_sides_in_processes_of_their_own(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    arguments = [*TINY, "--precision", "fp32", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["training_step.py", *arguments])
    script.main()
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3 and all(row["ours"] > 0 and row["reference"] > 0 for row in rows)


def test_on_the_cpu_no_gpu_is_taken(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    start, asked = script.start_accelerator, []

    def recorded(*args: Any) -> Any:
        asked.append(os.environ.get("ACCELERATE_USE_CPU"))
        return start(*args)

    monkeypatch.setattr(script, "start_accelerator", recorded)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for device in ("cpu", "cuda"):
        options = script.Options(channels=(32, 32), disc_channels=16, device=device)
        script.OurStep(options, script.photos(32, 1), "fp32")
    assert asked == ["true", None] and "ACCELERATE_USE_CPU" not in os.environ


def test_other_mathematics_is_noticed(script: ModuleType) -> None:
    options = script.Options(channels=(32, 32), disc_channels=16)
    images = script.photos(32, 1)
    ours = script.OurStep(options, images, "fp32")

    def within(**changes: Any) -> float:
        reference = script.ReferenceStep(
            script.SCRIPTS["diffusers mended"],
            ours.task.net,
            ours.task.discriminator,
            ours.task.metric.lpips,
            weights=replace(script.WEIGHTS, **changes),
            stock=False,
        )
        return script.difference(ours, reference, images)

    assert within() < 1e-4
    assert within(lpips=0.51) > 1e-3
    assert within(adversarial=0.51) > 1e-3


def test_references_compute_with_stock_layers(script: ModuleType) -> None:
    """A run's own layers are the network's to the letter, so an equality would not tell them."""
    ours = script.OurStep(
        script.Options(channels=(64, 128), disc_channels=16), script.photos(32, 1), "fp32"
    )
    parts = (ours.task.net, ours.task.metric.lpips)
    before = [[type(m) for m in part.modules()] for part in parts]
    assert {FoldedUpsample2D, TrainedWinogradConv2d} <= set(before[0])
    reference = script.ReferenceStep(
        script.SCRIPTS["diffusers mended"],
        parts[0],
        ours.task.discriminator,
        parts[1],
        weights=script.WEIGHTS,
    )
    assert 0 < script.layers_difference(ours, script.photos(32, 1)) < 1e-4
    for part in (reference.net, reference.lpips):
        assert not any(type(m).__module__.startswith("latentvae.models") for m in part.modules())
    assert before == [[type(m) for m in part.modules()] for part in parts]  # ours keep theirs


def test_in_float64_the_whole_update_is_that_of_stock_layers(script: ModuleType) -> None:
    """Where rounding is too small to turn LPIPS' gradient; Winograd's serve float32 alone."""
    images = script.photos(32, 2)
    ours = script.OurStep(script.Options(channels=(32, 32), disc_channels=16), images, "fp32")
    reference = script.ReferenceStep(
        script.SCRIPTS["diffusers mended"],
        ours.task.net,
        ours.task.discriminator,
        ours.task.metric.lpips,
        weights=script.WEIGHTS,
    )

    # convert everything to float64
    for module in (
        ours.task.net,
        ours.task.discriminator,
        ours.task.metric,
        *vars(reference).values(),
    ):
        if isinstance(module, nn.Module):
            module.double()
    for net in (ours.task.net, reference.net):  # a posterior is always float32
        net.quant_conv.register_forward_hook(lambda _module, _inputs, moments: moments.float())
        net.post_quant_conv.register_forward_pre_hook(lambda _module, inputs: inputs[0].double())

    # compare one update
    images = images.double()
    ours.batch = ours.batch._replace(images=images)
    assert script.difference(ours, reference, images) < 2e-6
