"""Optimised networks have the same numbers and parameters, and say what they are."""

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderRAE
from torch import Tensor

from latentvae.compute import inference
from latentvae.compute import optimization as opt
from latentvae.compute.optimization import Optimized, measure_psnr, optimize_network, probe
from latentvae.compute.winograd import convolutions
from latentvae.compute.winograd.convolutions import WinogradConv2d
from latentvae.compute.winograd.nnpack import has_winograd
from latentvae.errors import UserError
from latentvae.models import calls
from tests.tiny import TINY, images, kl, largest

needs_winograd = pytest.mark.skipif(not has_winograd(), reason="torch has no NNPACK here")


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt, "PROBE", 32)


KINDS = ("kl", "stock_vq", "movq", "fsq", "dc", "tiny")


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_exact_equals_the_network(name: str) -> None:
    net: Any = TINY[name]()
    optimized = optimize_network(net, mode="exact")
    assert (optimized.mode, optimized.psnr, str(optimized)) == ("exact", None, "exact")
    for batch in (images(72, 64), images(32, 32, count=2)):
        z = calls.encode(net, batch)
        assert largest(calls.encode(optimized.net, batch), z) <= 1e-5 * z.abs().max()
        recon = calls.decode(net, z)
        assert largest(calls.decode(optimized.net, z), recon) <= 1e-4 * recon.abs().max()


@torch.inference_mode()
def test_odd_latents() -> None:
    net = kl()
    exact = optimize_network(net, mode="exact").net
    z = torch.randn(2, 4, 17, 35, generator=torch.Generator().manual_seed(0))
    assert largest(calls.decode(exact, z), calls.decode(net, z)) <= 1e-4


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", KINDS)
def test_the_network_stays_as_it_is(name: str, mode: Any) -> None:
    net: Any = TINY[name]()
    before, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    optimized = optimize_network(net, mode=mode).net
    assert [type(m) for m in net.modules()] == classes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    after = net.state_dict()
    assert after.keys() == before.keys() == optimized.state_dict().keys()
    assert all(torch.equal(value, before[k]) for k, value in after.items())
    assert {value.dtype for value in after.values()} == {v.dtype for v in before.values()}
    assert all(parameter.is_contiguous() for parameter in net.parameters())


@needs_winograd
def test_exact_shares_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "has_instructions", lambda *names: False)
    net = kl()
    exact = optimize_network(net, mode="exact").net
    pairs = zip(net.parameters(), exact.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


@needs_winograd
def test_exact_uses_winograd_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "has_instructions", lambda *names: False)
    exact = optimize_network(kl(), mode="exact").net
    assert sum(type(m) is WinogradConv2d for m in exact.modules()) > 10
    assert convolutions.LIMITS.positions <= 72 * 64  # the images above are large enough for it
    assert type(exact.encoder.conv_in) is type(exact.decoder.conv_out) is torch.nn.Conv2d


@needs_winograd
@torch.inference_mode()
def test_exact_folds_the_upsampling_that_winograd_does_not_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "has_instructions", lambda *names: False)
    monkeypatch.setattr(convolutions, "LIMITS", convolutions.limits_of("AVX2"))
    net: Any = kl()  # narrower than 128 channels
    exact = optimize_network(net, mode="exact").net
    assert any(type(m) is inference.FrozenUpsample2D for m in exact.decoder.modules())
    z = calls.encode(net, images(40, 48))
    recon = calls.decode(net, z)
    assert largest(calls.decode(exact, z), recon) <= 1e-5 * recon.abs().max()


@pytest.mark.parametrize("reason", ["without NNPACK", "with AMX"])
@pytest.mark.parametrize("name", ["kl", "stock_vq", "fsq", "dc"])
@torch.inference_mode()
def test_exact_without_winograd(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "has_winograd", lambda: reason != "without NNPACK")
    monkeypatch.setattr(inference, "has_instructions", lambda *names: reason == "with AMX")
    net: Any = TINY[name]()
    exact = inference.build_exact(net)
    assert not any(type(m) is WinogradConv2d for m in exact.modules())
    z = calls.encode(net, images(40, 48))
    assert largest(calls.encode(exact, images(40, 48)), z) <= 1e-5 * z.abs().max()
    recon = calls.decode(net, z)
    assert largest(calls.decode(exact, z), recon) <= 1e-5 * recon.abs().max()


def test_exact_in_bfloat16_stays_there() -> None:
    net = kl().to(torch.bfloat16)
    exact = optimize_network(net, mode="exact").net
    assert calls.encode(exact, images(32, 32).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_fast_is_in_bfloat16_and_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt, "multiplies_bfloat16", lambda device: True)
    net: Any = TINY[name]()
    optimized = optimize_network(net, mode="fast")
    fast = inference.build_fast(net)
    assert torch.bfloat16 in {p.dtype for p in fast.decoder.parameters()}
    z = calls.encode(net, images(32, 48))
    ours, theirs = calls.encode(fast, images(32, 48)), calls.decode(net, z)
    assert ours.dtype == calls.decode(fast, z).dtype == torch.float32
    if calls.num_codes(net) is not None:
        assert largest(ours, z) <= 1e-5 * z.abs().max()  # so that the tokens are the same
    error = (calls.decode(fast, z) - theirs).square().mean()
    assert 0 < error < 1e-3 * theirs.square().mean()
    psnr = measure_psnr(fast, net)
    assert optimized.mode == ("fast" if psnr >= 45 else "exact")
    assert f"{psnr:.0f}" in str(optimized) or f"{psnr:.1f}" in str(optimized)


@needs_winograd
@torch.inference_mode()
def test_wide_blocks_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "has_instructions", lambda *names: names != ("amx_bf16",))
    monkeypatch.setattr(inference, "WIDE", 64)
    net = kl()
    mixed = inference.build_fast(net)
    middle = mixed.decoder.mid_block
    assert {p.dtype for p in middle.parameters()} == {torch.float32}
    shared = middle.resnets[0].conv1.weight.data_ptr()
    assert shared == net.decoder.mid_block.resnets[0].conv1.weight.data_ptr()  # not rounded
    assert mixed.decoder.conv_out.weight.dtype == torch.bfloat16
    monkeypatch.setattr(inference, "WIDE", 1000)
    assert measure_psnr(mixed, net) > measure_psnr(inference.build_fast(net), net)


def test_fast_without_the_hardware_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt, "multiplies_bfloat16", lambda device: False)
    optimized = optimize_network(kl(), mode="fast")
    assert str(optimized) == "exact (this machine does not multiply in bfloat16)"


def test_fast_that_is_too_far_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(opt, "MIN_PSNR", 200.0)
    optimized = optimize_network(kl(), mode="fast")
    assert optimized.mode == "exact"
    assert optimized.why.endswith("dB, less than 200")


def test_psnr_of_a_known_error() -> None:
    class Shifted(torch.nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift
            self.config, self.device, self.dtype = {"in_channels": 3}, "cpu", torch.float32

        def encode(self, x: Tensor) -> Any:
            return type("Output", (), {"latent": x})

        def decode(self, z: Tensor) -> Any:
            return type("Output", (), {"sample": z / 4 + self.shift})

    # 10 log10(2 ** 2 / 0.02 ** 2)
    assert measure_psnr(Shifted(0.02), Shifted(0.0)) == pytest.approx(40.0, abs=1e-3)


def test_the_probe_is_a_picture_of_any_channels() -> None:
    for channels in (1, 3, 4):
        picture = probe(kl(image_channels=channels), side=16)
        assert picture.shape == (1, channels, 16, 16)
        assert picture.abs().max() <= 1 and picture.std() > 0.2


def test_other_networks_stay_stock() -> None:
    rae = AutoencoderRAE.__new__(AutoencoderRAE)
    torch.nn.Module.__init__(rae)
    rae.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    assert str(optimize_network(rae, mode="exact")) == "stock (AutoencoderRAE is not optimised)"


def test_wrong_choices_name_the_right_ones() -> None:
    with pytest.raises(UserError, match=r"optimize must be one of .*'exakt'.*did you mean 'exact'"):
        optimize_network(kl(), mode="exakt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="got dtype bfloat16"):
        optimize_network(kl().to(torch.bfloat16), mode="fast")
    assert str(Optimized(None, "fast", 51.26)) == "fast, 51.3 dB against exact"
