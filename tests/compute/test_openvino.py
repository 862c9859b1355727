"""Networks that run in OpenVINO. Without the package, only its error is tested."""

import builtins
import gc
import importlib.util
import signal
from typing import Any

import pytest
import torch

from latentvae.compute import openvino
from latentvae.compute import optimization as opt
from latentvae.compute.openvino import CompiledHalf
from latentvae.compute.optimization import optimize_network
from latentvae.errors import UserError
from latentvae.models import calls
from tests.tiny import TINY, images, kl, largest

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"
)


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt, "PROBE", 32)


@needs_openvino
@pytest.mark.parametrize(
    "name",
    ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kl", "fsq"))],
)
@torch.inference_mode()
def test_in_float32_it_equals_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt, "multiplies_bfloat16", lambda device: False)
    net: Any = TINY[name]()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimized = optimize_network(net, mode="openvino")
    assert optimized.mode == "openvino" and (optimized.psnr or 0) > 80
    for batch in (images(40, 36), images(16, 24, count=2)):
        z = calls.encode(net, batch)
        assert largest(calls.encode(optimized.net, batch), z) <= 1e-5 * z.abs().max()
        recon = calls.decode(net, z)
        assert largest(calls.decode(optimized.net, z), recon) <= 1e-5 * recon.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.slow
@needs_openvino
@torch.inference_mode()
def test_tokens_do_not_turn_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt, "multiplies_bfloat16", lambda device: True)
    net: Any = TINY["stock_vq"]()
    optimized = optimize_network(net, mode="openvino").net
    z = calls.encode(net, images(32, 32))
    assert largest(calls.encode(optimized, images(32, 32)), z) <= 1e-5 * z.abs().max()
    recon = calls.decode(net, z)
    assert largest(calls.decode(optimized, z), recon) <= 0.05 * recon.abs().max()


@needs_openvino
def test_signals_are_handled_after_a_network_has_gone() -> None:
    """A failure crashes this process, because a stack for signal handlers was freed."""
    handled: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    conv = torch.nn.Conv2d(3, 3, 1).eval()
    halves = [CompiledHalf(conv, torch.zeros(1, 3, 8, 8), precision="f32") for _ in range(2)]
    while halves:
        del halves[0]
        gc.collect()
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert handled == [signal.SIGUSR1]


def test_pictures_that_are_too_far_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "build_openvino", lambda net, precision: net)
    monkeypatch.setattr(opt, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(opt, "MIN_PSNR_OPENVINO", 300.0)
    with pytest.raises(UserError, match=r"PSNR of \d+\.\d dB against .*, less than 300"):
        optimize_network(kl(), mode="openvino")


@needs_openvino
def test_networks_that_it_cannot_convert() -> None:
    with pytest.raises(UserError, match="spatial norms"):
        optimize_network(TINY["movq"](), mode="openvino")
    with pytest.raises(UserError, match=r"on the CPU \(got 'meta'"):
        optimize_network(kl().to("meta"), mode="openvino")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "openvino":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install latentvae\[openvino\]"):
        optimize_network(kl(), mode="openvino")
