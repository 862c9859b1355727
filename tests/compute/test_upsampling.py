"""Folded upsampling equals plain upsampling: values, gradients, state dicts, networks."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

from latentvae.compute.upsampling import (
    FoldedUpsample2D,
    fold_kernel,
    fold_upsampling,
    unfold_upsampling,
    upsample_conv,
)
from latentvae.models import FAMILIES, build_autoencoder_kl

SIZES = [(1, 1), (1, 5), (4, 3), (7, 8)]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def parameters(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(5, 3, 3, 3, dtype=dtype), torch.randn(5, dtype=dtype)
    return weight.requires_grad_(), bias.requires_grad_()


def test_kernel_of_distinct_powers() -> None:
    """Taps 1, 10 and 100 show by hand which of them each of the four phases reads."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1] = torch.tensor([1.0, 10.0, 100.0])
    across = torch.tensor([100.0, 110.0, 11.0, 1.0])
    down = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert torch.equal(fold_kernel(weight)[0, 0], down[:, None] * across)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_with_borders(size: tuple[int, int], with_bias: bool) -> None:
    weight, bias = parameters()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, weight, bias] if with_bias else [x, weight]
    results = []
    for function in (plain, upsample_conv):
        y = function(x, weight, bias if with_bias else None)
        mix = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        results.append([y, *torch.autograd.grad((y * mix).sum(), inputs)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    weight, bias = parameters()
    x = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(upsample_conv, (x, weight, bias))
    assert torch.autograd.gradgradcheck(upsample_conv, (x, weight, bias))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_within_rounding_in_either_layout(memory_format: torch.memory_format) -> None:
    weight, bias = parameters(torch.float32)
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=memory_format)
    found = upsample_conv(x, weight, bias)
    torch.testing.assert_close(found, plain(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=memory_format)


def test_bf16_autocast_sums_taps_before_it_rounds_them() -> None:
    weight, bias = parameters(torch.float32)
    x = torch.randn(2, 3, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = upsample_conv(x, weight, bias)
        assert fold_kernel(weight).dtype == torch.float32
    assert found.dtype == torch.bfloat16
    exact = plain(x, weight, bias)
    assert (found - exact).norm() < 0.005 * exact.norm()  # 2 ** -8 is 0.004


def tiny(architecture: str) -> Any:
    options: dict[str, Any] = {"block_out_channels": (8, 8, 16)}
    if architecture == "asymmetric":
        options = {"block_out_channels": (8, 8, 8, 8), "up_block_out_channels": (8, 16, 32, 32)}
    if architecture == "dc":
        layers = {"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1)}
        return FAMILIES["dc"].build(**options, **layers, latent_channels=4)
    if architecture == "vq":
        options |= {"latent_channels": 4, "quantizer": {"type": "fsq", "levels": (4, 4)}}
    return FAMILIES[architecture].build(**options, norm_num_groups=4)


@pytest.mark.parametrize(("architecture", "count"), [("kl", 2), ("asymmetric", 3), ("vq", 2)])
def test_networks_keep_their_values_and_gradients(architecture: str, count: int) -> None:
    check_network(architecture, count)


def test_autoencoder_dc_with_its_shortcuts() -> None:
    check_network("dc", 2)


def check_network(architecture: str, count: int) -> None:
    stock = tiny(architecture).double()
    folded = copy.deepcopy(stock)
    assert fold_upsampling(folded) == count
    assert fold_upsampling(folded) == 0  # all are folded already
    assert folded.state_dict().keys() == stock.state_dict().keys()
    images = torch.rand(1, 3, 16, 24, dtype=torch.float64) * 2 - 1
    found, expected = (gradients(net, images) for net in (folded, stock))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
    unfold_upsampling(folded)
    assert [type(m) for m in folded.modules()] == [type(m) for m in stock.modules()]


def gradients(net: Any, images: Tensor) -> dict[str, Tensor]:
    """Return the reconstruction, and the gradient of its square at each parameter."""
    torch.manual_seed(0)
    recon = net(images).sample
    recon.square().mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"recon": recon.detach(), **grads}


def test_folded_networks_are_copied_saved_and_checkpointed(tmp_path: Any) -> None:
    net: Any = build_autoencoder_kl(block_out_channels=(8, 8), norm_num_groups=4)
    fold_upsampling(net)
    assert any(isinstance(module, FoldedUpsample2D) for module in copy.deepcopy(net).modules())
    net.save_pretrained(tmp_path)
    loaded: Any = AutoencoderKL.from_pretrained(tmp_path)
    assert not any(isinstance(module, FoldedUpsample2D) for module in loaded.modules())
    images = torch.rand(1, 3, 16, 16)
    without = gradients(net, images)
    net.zero_grad()
    net.enable_gradient_checkpointing()
    for name, value in gradients(net, images).items():
        assert torch.equal(value, without[name]), name


def test_another_size_than_the_double_stays_plain() -> None:
    layer = Upsample2D(3, use_conv=True, out_channels=5)
    x = torch.randn(1, 3, 4, 4)
    expected = [layer(x, output_size) for output_size in (None, (8, 8), (7, 9))]
    assert fold_upsampling(layer) == 1
    for output_size, value in zip((None, (8, 8), (7, 9)), expected, strict=True):
        torch.testing.assert_close(layer(x, output_size), value, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x, (7, 9)), expected[2])


@pytest.mark.parametrize(
    "options",
    [
        {"use_conv": False},
        {"use_conv_transpose": True},
        {"use_conv": True, "kernel_size": 1, "padding": 0},
        {"use_conv": True, "interpolate": False},
    ],
)
def test_layers_that_are_no_such_pair_are_left_alone(options: dict[str, Any]) -> None:
    layer = Upsample2D(3, **options)
    assert fold_upsampling(layer) == 0 and type(layer) is Upsample2D


def test_layer_norm_before_it_and_the_other_name_of_its_convolution() -> None:
    layer = Upsample2D(
        3, use_conv=True, name="Conv2d_0", norm_type="ln_norm", eps=1e-5, elementwise_affine=True
    )
    x = torch.randn(1, 3, 4, 4)
    expected = layer(x)
    assert fold_upsampling(layer) == 1
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
