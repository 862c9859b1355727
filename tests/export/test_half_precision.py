"""The float16 check: its emulation against real float16, and what it calls safe."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

from latentvae.export import HalfPrecision, check_half_precision


@pytest.fixture
def net() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
    }
    return AutoencoderKL(norm_num_groups=4, **blocks).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def reconstruct(net: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.decode(net.encode(images).latent_dist.mode()).sample


def test_emulation_errs_as_much_as_real_float16(net, images) -> None:
    emulated = check_half_precision(net, images)
    exact = reconstruct(net, images)
    error = reconstruct(net.half(), images.half()).float() - exact
    real = 10 * math.log10(4 / error.square().mean().item())
    assert emulated.safe
    assert emulated.psnr == pytest.approx(real, abs=3.0)


def test_emulation_overflows_where_real_float16_does(net, images) -> None:
    with torch.no_grad():
        net.decoder.conv_in.weight.mul_(1e7)
    result = check_half_precision(net, images)
    assert reconstruct(net, images).isfinite().all()
    assert not reconstruct(net.half(), images.half()).isfinite().all()
    assert math.isnan(result.psnr)
    assert result.max_activation > 65504
    assert not result.safe
    assert "not finite" in str(result)


def test_the_largest_activation_is_seen(net, images) -> None:
    with torch.no_grad():
        net.decoder.conv_out.bias[1] = 300.0
    expected = reconstruct(net, images).abs().max().item()
    assert check_half_precision(net, images).max_activation == expected


def test_the_network_is_left_as_it_was(net, images) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    check_half_precision(net, images)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_broken_network_is_an_error(net, images) -> None:
    with torch.no_grad():
        net.decoder.conv_out.bias[0] = math.inf
    with pytest.raises(ValueError, match="float32 reconstructions are not finite"):
        check_half_precision(net, images)


@pytest.mark.parametrize(
    ("max_activation", "psnr", "safe"),
    [(16376.0, 40.0, True), (16377.0, 60.0, False), (10.0, 39.9, False), (10.0, math.nan, False)],
)
def test_limits(max_activation: float, psnr: float, safe: bool) -> None:
    assert HalfPrecision(max_activation, psnr).safe is safe
