"""The computed peak memory of an update, beside the real one on the CPU.

A backward pass of fake tensors starts autograd's threads. A process that has them cannot fork one
that trains, so each test computes in a process of its own.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from tests.forks import forked

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    AcceleratorState._reset_state(True)
    yield importlib.import_module("memory")
    AcceleratorState._reset_state(True)
    sys.path.remove(str(BENCHMARKS))


def allocated_peak(events: list[torch._C._autograd._KinetoEvent]) -> int:
    """The largest number of bytes that the CPU's allocator had given out."""
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def in_a_process_of_its_own(computed: Callable[[], list[int]], folder: Path) -> list[int]:
    result = folder / "result.json"
    output = folder / "output.txt"
    code = forked(lambda: result.write_text(json.dumps(computed())), output=output)
    assert code == 0, output.read_text()
    return json.loads(result.read_text())


@pytest.mark.slow
def test_the_computed_peak_is_that_of_the_allocator(script: ModuleType, tmp_path: Path) -> None:
    options = script.Options(resolution=32)
    config = script.config_of("kl_small", options, 4).with_changes({"run": {"winograd": False}})

    def peaks() -> list[int]:
        computed, fixed = script.peak(config, device="cpu")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            real, _ = script.peak(config, device="cpu", fake=False)
        return [computed, fixed, real, allocated_peak(profiled.profiler.kineto_results.events())]

    computed, fixed, real, allocated = in_a_process_of_its_own(peaks, tmp_path)
    assert 0 < fixed < computed
    assert computed == pytest.approx(real, rel=0.01)
    assert computed == pytest.approx(allocated, rel=0.03)


@pytest.mark.slow
def test_norms_of_a_gpu_take_more_memory_in_bf16(script: ModuleType, tmp_path: Path) -> None:
    config = script.config_of("kl_small", script.Options(resolution=32), 4)
    # Here, a step of Muon would need more memory than the update itself.
    adamw = {"optimizer": "adamw"}
    config = config.with_changes({"run": {"mixed_precision": "bf16"}, "optimizer": adamw})

    def peaks() -> list[int]:
        return [script.peak(config, device=device)[0] for device in ("cuda", "cpu")]

    on_a_gpu, on_a_cpu = in_a_process_of_its_own(peaks, tmp_path)
    assert on_a_gpu > 1.05 * on_a_cpu
