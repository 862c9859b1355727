"""Convolutions with fewer multiplications against plain ones in double precision."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentvae.compute import inference
from latentvae.compute.inference import build_exact
from latentvae.compute.stock_layers import restore_stock_layers
from latentvae.compute.winograd import convolutions, nnpack, tiles
from latentvae.compute.winograd.convolutions import (
    TrainedWinogradConv2d,
    WinogradConv2d,
    swap_convolutions,
)
from latentvae.compute.winograd.nnpack import has_winograd, nnpack_conv
from latentvae.compute.winograd.tiles import A2, B2, G2, tiled_conv, tiled_gradients
from tests.tiny import images, kl, largest

needs_nnpack = pytest.mark.skipif(not has_winograd(), reason="torch has no NNPACK here")


@needs_nnpack
def test_nnpack_against_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 32, 40, 33), (3, 64, 3, 50), (1, 33, 1, 1)):
        x = torch.randn(shape, generator=generator)
        weight = torch.randn(48, shape[1], 3, 3, generator=generator) / (9 * shape[1]) ** 0.5
        bias = torch.randn(48, generator=generator)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        assert largest(nnpack_conv(x, weight, bias), exact) < 2e-4
        without = exact - bias.double().view(1, -1, 1, 1)
        assert largest(nnpack_conv(x, weight, None), without) < 2e-4
        one = nnpack_conv(x[:1], weight, bias)
        assert torch.equal(nnpack_conv(x, weight, bias)[:1], one)  # whatever lies beside it


@needs_nnpack
def test_large_maps_are_convolved_by_rows_to_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(2, 32, 37, 20, generator=generator), torch.randn(48, generator=generator)
    weight = torch.randn(48, 32, 3, 3, generator=generator) / 17
    whole = nnpack_conv(x, weight, bias)
    calls: list[int] = []
    compute = torch._nnpack_spatial_convolution

    def count(x: Tensor, *rest: Any) -> Tensor:
        calls.append(x.shape[2])
        return compute(x, *rest)

    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", count)
    row_of_tiles = 4 * 8 * 8 * (32 + 48) * 4  # bytes. Four tiles are 20 columns, seven are 37 rows
    for workspace, rows in (
        (0, [8] * 6 + [3]),  # at least a row of tiles, with the positions around it
        (2 * row_of_tiles, [14, 14, 14, 3]),
        (6 * row_of_tiles, [26, 15]),  # about halves
        (7 * row_of_tiles, [37]),
    ):
        calls.clear()
        monkeypatch.setattr(nnpack, "WORKSPACE", workspace)
        assert torch.equal(nnpack_conv(x, weight, bias), whole)
        assert calls == 2 * rows


def test_the_transforms_are_a_convolution_exactly() -> None:
    """Test A2 [(G2 w) (B2 x)] in double precision. Numbers of G2 are multiples of 1 / 576."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(1, 1, n, n, generator=generator, dtype=torch.float64) for n in (6, 3))
    unrounded = torch.round(G2.double() * 576) / 576
    y = A2.double() @ ((unrounded @ w.flatten()) * (B2.double() @ x.flatten()))
    assert torch.allclose(y.view(4, 4), F.conv2d(x, w)[0, 0], rtol=0, atol=1e-12)


def case(shape: tuple[int, ...], outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, weight, bias and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (outputs, shape[1], 3, 3), (outputs,), (shape[0], outputs, *shape[2:]))
    x, weight, bias, gradient = (torch.randn(size, generator=generator) for size in sizes)
    return x, weight / (9 * shape[1]) ** 0.5, bias, gradient


def plain_results(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return the output and the gradients of x, weight and bias, in double precision."""
    given = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*given, padding=1)
    return [y.detach(), *torch.autograd.grad(y, given, gradient.double())]


@pytest.mark.parametrize("chunk", [tiles.CHUNK_BYTES, 1 << 14])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((2, 5, 9, 6), 7), ((3, 4, 4, 4), 4), ((1, 3, 1, 1), 2), ((2, 32, 17, 30), 40)],
)
def test_tiles_and_their_gradients(
    shape: tuple[int, ...], outputs: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CHUNK_BYTES", chunk)
    x, weight, bias, gradient = case(shape, outputs)
    y, dx, dweight, _ = plain_results(x, weight, bias, gradient)
    assert largest(tiled_conv(x, weight, bias), y) < 5e-5
    of_x, of_weight = tiled_gradients(gradient, x, weight, of_x=True, of_weight=True)
    assert of_x is not None and largest(of_x, dx) < 5e-5
    assert of_weight is not None and largest(of_weight, dweight) < 2e-5 * dweight.abs().max()
    alone, none = tiled_gradients(gradient, x, weight, of_x=True, of_weight=False)
    assert alone is not None and torch.equal(alone, of_x) and none is None


@pytest.mark.parametrize("path", ["nnpack", "tiles", "plain"])
def test_the_layer_gives_the_gradients_of_a_plain_one(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "nnpack" and not has_winograd():
        pytest.skip("torch has no NNPACK here")
    monkeypatch.setattr(convolutions, "TRAINING_POSITIONS", 0 if path == "nnpack" else 10**9)
    tiled = {"one": 0, "both": 0} if path == "tiles" else {"one": 9999, "both": 9999}
    monkeypatch.setattr(convolutions, "LIMITS", replace(convolutions.LIMITS, tiled=tiled))
    x, weight, bias, gradient = case((2, 32, 20, 18), 48)
    expected = plain_results(x, weight, bias, gradient)
    conv: Any = nn.Conv2d(32, 48, 3, padding=1)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    assert swap_convolutions(conv, trained=True) == 1 and type(conv) is TrainedWinogradConv2d
    x.requires_grad_()
    y = conv(x)
    found = [y.detach(), *torch.autograd.grad(y, [x, conv.weight, conv.bias], gradient)]
    for ours, theirs in zip(found, expected, strict=True):
        assert largest(ours, theirs) < 2e-5 * max(2.5, theirs.abs().max())
    conv.requires_grad_(False)  # as LPIPS is
    (dx,) = torch.autograd.grad(conv(x), x, gradient)
    assert largest(dx, expected[1]) < 5e-5


@needs_nnpack
def test_inference_is_plain_under_autocast_and_in_other_precisions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "has_instructions", lambda *names: False)
    monkeypatch.setattr(convolutions, "LIMITS", convolutions.limits_of("AVX512"))
    net: Any = kl(layers_per_block=1)
    exact, x = build_exact(net), images(40, 36)
    assert any(type(module) is WinogradConv2d for module in exact.modules())
    with torch.inference_mode():
        recon = net(x).sample
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (n(x).sample.sub(recon).square().mean() for n in (exact, net))
    assert 0 < ours < 2 * theirs  # residual sums in place round one more time
    conv = nn.Conv2d(32, 32, 3, padding=1)
    swap_convolutions(conv.requires_grad_(False))
    assert conv.double()(torch.zeros(1, 32, 40, 40).double()).dtype == torch.float64


@needs_nnpack
def test_a_frozen_layer_transforms_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "TRAINING_POSITIONS", 0)
    monkeypatch.setattr(
        convolutions, "LIMITS", replace(convolutions.LIMITS, tiled={"one": 0, "both": 0})
    )
    monkeypatch.setattr(convolutions, "tiled_gradients", None)  # not to be called
    conv = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    swap_convolutions(conv, trained=True)
    x = torch.randn(1, 32, 12, 12, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None


def test_inputs_without_images_or_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "TRAINING_POSITIONS", 0)
    conv = nn.Conv2d(32, 32, 3, padding=1)
    swap_convolutions(conv, trained=True)
    assert conv(torch.zeros(0, 32, 8, 8)).shape == (0, 32, 8, 8)  # no image
    assert conv(torch.zeros(32, 8, 8)).shape == (32, 8, 8)  # one without a batch


def test_shapes_choose_the_algorithm() -> None:
    wide, narrow = torch.zeros(256, 256, 3, 3), torch.zeros(64, 64, 3, 3)
    assert convolutions._fits_tiles(torch.zeros(8, 256, 16, 16), wide, "one")
    assert not convolutions._fits_tiles(torch.zeros(8, 256, 8, 8), wide, "one")  # few tiles
    assert not convolutions._fits_tiles(torch.zeros(8, 64, 32, 32), narrow, "both")
    assert convolutions._fits_nnpack(torch.zeros(1, 32, 64, 64)) == has_winograd()
    assert not convolutions._fits_nnpack(torch.zeros(1, 32, 63, 64))


def test_without_avx512_only_wide_convolutions_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolutions, "LIMITS", convolutions.limits_of("AVX2"))
    wide, narrow = (nn.Conv2d(n, n, 3, padding=1) for n in (128, 64))
    assert swap_convolutions(wide) == 1 and swap_convolutions(narrow) == 0
    for asked in ("one", "both"):
        maps = {n: torch.zeros(8, n, 32, 32) for n in (64, 128)}
        assert convolutions._fits_tiles(maps[128], wide.weight, asked)
        assert not convolutions._fits_tiles(maps[64], narrow.weight, asked)
    called: list[Any] = []
    monkeypatch.setattr(convolutions, "nnpack_conv", lambda x, *_: called.append(x))
    wide(torch.zeros(1, 128, 63, 64))
    assert not called
    wide(torch.zeros(1, 128, 64, 64))
    assert called


def test_a_network_gives_the_same_and_is_stock_again_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolutions, "TRAINING_POSITIONS", 32 * 32)
    net: Any = kl(layers_per_block=1)
    plain = copy.deepcopy(net)
    assert swap_convolutions(net, trained=True) > 10
    x = images(40, 36)
    for each in (net, plain):
        each(x).sample.square().mean().backward()
    scale = max(p.grad.abs().max() for p in plain.parameters())
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert largest(ours.grad, theirs.grad) < 1e-4 * scale
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x).sample, plain(x).sample)
    restore_stock_layers(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    assert list(net.state_dict()) == list(plain.state_dict())
