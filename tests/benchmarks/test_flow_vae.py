"""The comparison of a VAE with and without a flow: equal noise, and bits at equal PSNR."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "flow_vae.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_flow_vae", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the option parser reads the source through it
    spec.loader.exec_module(module)
    return module


def run_of(arm: str, psnr: float, bits: float, *, seed: int = 0) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "kl_weight": 1.0, "psnr_sample": psnr, "kl_bits": bits}


def test_bits_are_compared_at_equal_psnr(script: ModuleType) -> None:
    plain = [run_of("plain", 22.0, 4.0), run_of("plain", 20.0, 1.0), run_of("plain", 9, 9, seed=1)]
    flows = [run_of("flow", psnr, 1.6) for psnr in (21.0, 22.1, 19.9)]
    (row,) = script.compared([*plain, *flows])  # the others lie outside the plain VAE's range
    assert row["plain_bits"] == pytest.approx(2.0) and row["saved"] == pytest.approx(0.2)


def test_before_training_all_arms_of_one_variance_are_equal(script: ModuleType) -> None:
    images = torch.rand(66, 3, 16, 16) * 2 - 1
    options = script.Options(
        data="", validation_data="", json=Path(), updates=0, block_out_channels=(16, 32), width=8
    )
    found = {}
    for arm in (script.PLAIN, script.FLOW, script.FIXED):
        wrapper = script.train(images, options, arm=arm, kl_weight=1.0, seed=0)
        found[arm] = script.measured(wrapper, images[:4], samples=2)
    plain, flow = found[script.PLAIN], found[script.FLOW]
    assert flow["psnr_sample"] == pytest.approx(plain["psnr_sample"], abs=1e-4)
    assert flow["kl_bits"] == pytest.approx(plain["kl_bits"], rel=1e-5)
    assert plain["kl_standard_error"] == 0.0
    assert found[script.FIXED]["psnr_sample"] != plain["psnr_sample"]
