"""The 16-bit check: its emulation against real 16-bit networks, and what it calls safe."""

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from latentvae.export import HalfPrecision, check_half_precision
from latentvae.export.half_precision import check_precisions
from latentvae.models.calls import decode, encode

BFLOAT16 = torch.bfloat16


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


def test_bfloat16_errs_as_much_as_real_bfloat16(net, images) -> None:
    emulated = check_half_precision(net, images, dtype=BFLOAT16)
    exact = reconstruct(net, images)
    error = reconstruct(net.to(BFLOAT16), images.to(BFLOAT16)).float() - exact
    real = 10 * math.log10(4 / error.square().mean().item())
    assert emulated.psnr == pytest.approx(real, abs=3.0)
    assert emulated.psnr < check_half_precision(net.float(), images).psnr - 10


def test_bfloat16_has_the_range(net, images) -> None:
    with torch.no_grad():
        net.decoder.conv_in.weight.mul_(1e7)
    float16, bfloat16 = check_precisions(net, images, dtypes=(torch.float16, BFLOAT16))
    assert bfloat16 == check_half_precision(net, images, dtype=BFLOAT16)  # no trace of float16
    assert math.isnan(float16.psnr_cost)
    assert bfloat16.max_activation == float16.max_activation
    assert bfloat16.psnr > 20
    assert bfloat16.safe


def test_every_layer_has_its_peak(net, images) -> None:
    with torch.no_grad():
        net.decoder.conv_in.weight.mul_(1e7)
        z = net.encode(images).latent_dist.mode()
        expected = net.decoder.conv_in(net.post_quant_conv(z)).abs().max().item()
    result = check_half_precision(net, images)
    assert result.layers["decoder.conv_in"] == expected
    assert result.layers["latents"] == z.abs().max().item()
    assert result.layers["encoder.conv_in"] < 100
    assert result.layers[result.largest_layer] == result.max_activation
    assert result.largest_layer.startswith("decoder.mid_block.")


def test_images_of_different_sizes_count_by_their_pixels(net, images) -> None:
    small = images[:1, :, :8]
    both = check_half_precision(net, [images, small])
    parts = [check_half_precision(net, part) for part in (images, small)]
    errors = [4 * 10 ** (-part.psnr / 10) * n for part, n in zip(parts, (4, 1), strict=True)]
    assert both.psnr == pytest.approx(10 * math.log10(4 / (sum(errors) / 5)))
    assert both.max_activation == max(part.max_activation for part in parts)
    with pytest.raises(ValueError, match="at least one image"):
        check_half_precision(net, [])


class Output(BaseOutput):
    sample: Tensor


class Bias(nn.Module):
    """Adds `value` and returns it in a structure, beside what is not an activation."""

    def __init__(self, value: float, structure: Any) -> None:
        super().__init__()
        self.value, self.structure = nn.Parameter(torch.tensor(value)), structure

    def forward(self, x: Tensor, _quantised: None = None) -> Any:
        return self.structure(x + self.value)


class Pair(nn.Module):
    """A decoder of two such modules."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        indices, loss = torch.arange(3), torch.tensor(1e9)
        self.first = Bias(first, lambda x: (x, None, indices, loss))
        self.second = Bias(second, lambda x: Output(sample=x))

    def forward(self, z: Tensor) -> Tensor:
        x, _, indices, _ = self.first(z)
        assert indices.dtype == torch.int64
        return self.second(x).sample


@pytest.fixture
def pair() -> Any:
    """The decoder adds 1/3 and takes 0.3 away; its latents are the images."""
    net = AutoencoderTiny(
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
        latent_channels=3,
    )
    net.encoder, net.decoder = nn.Identity(), Pair(1 / 3, -0.3)
    return net.eval()


def test_rounds_at_every_step_also_in_structures(pair, images) -> None:
    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().float()

    def levels(x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) * 127.5).round().double()

    first, second = rounded(torch.tensor(1 / 3)), rounded(torch.tensor(-0.3))
    half = rounded(rounded(rounded(images) + first) + second)
    exact = images + 1 / 3 - 0.3
    psnr = 10 * math.log10(4 / (half - exact).double().square().mean().item())
    before, after = ((levels(x) - levels(images)).square().mean().item() for x in (exact, half))
    result = check_half_precision(pair, images, dtype=BFLOAT16)
    assert result.psnr == pytest.approx(psnr, abs=1e-3)
    assert result.psnr_cost == pytest.approx(10 * math.log10(after / before))
    assert result.max_activation == pytest.approx((images + 1 / 3).max().item())
    assert result.largest_layer == "decoder.first"


def test_an_exact_copy_costs_nothing(pair) -> None:
    """Its PSNR against the images is infinite in both precisions."""
    pair.decoder = Pair(0.0, 0.0)
    images = (torch.arange(256.0) / 127.5 - 1).view(1, 1, 16, 16)  # all levels
    result = check_half_precision(pair, images.expand(1, 3, -1, -1), dtype=BFLOAT16)
    assert result.psnr > 50
    assert result.psnr_cost == 0.0
    coarse = check_half_precision(pair, torch.ones(1, 3, 8, 8), dtype=BFLOAT16)
    assert (coarse.psnr, coarse.psnr_cost, coarse.safe) == (math.inf, 0.0, True)


def test_an_exact_copy_that_is_lost_costs_infinitely(pair, images) -> None:
    pair.decoder = Pair(1e4, -1e4)
    images = images.mul(64).round() / 64  # exact beside 1e4 in float32, lost in bfloat16
    result = check_half_precision(pair, images, dtype=BFLOAT16)
    assert result.psnr_cost == math.inf
    assert not result.safe


def test_a_tokenizer(images) -> None:
    torch.manual_seed(0)
    net = VQModel(norm_num_groups=4, block_out_channels=(8,), num_vq_embeddings=16).eval()
    with torch.no_grad():
        expected = decode(net, encode(net, images)).abs().max().item()
    result = check_half_precision(net, images)
    assert result.layers["reconstruction"] == expected
    assert result.psnr > 30
    assert result.flipped is not None and result.flipped < 0.1


@pytest.fixture
def two_codes() -> Any:
    """A tokenizer of pixels: its codes are the greys 0.25 and 0.75."""
    net: Any = VQModel(
        norm_num_groups=4, block_out_channels=(8,), latent_channels=3, num_vq_embeddings=2
    )
    net.encoder = net.quant_conv = net.post_quant_conv = nn.Identity()
    net.decoder = Bias(0.0, lambda x: x)
    with torch.no_grad():
        net.quantize.embedding.weight.copy_(torch.tensor([[0.25], [0.75]]).expand(2, 3))
    return net.eval()


def test_other_codes_that_are_as_good_are_safe(two_codes) -> None:
    """Both are 0.25 away from a grey of 0.5001, which float16 takes for 0.5."""
    images = torch.full((1, 3, 8, 8), 0.5001)
    images[..., :2] = 0.3
    result = check_half_precision(two_codes, images)
    assert result.flipped == 0.75
    assert result.psnr == pytest.approx(10 * math.log10(4 / (0.75 * 0.5**2)))
    assert result.psnr_cost == 0.0 and result.safe
    said = "because 75.00% of the indices differ: 0.00 dB less PSNR against the images"
    assert str(result).endswith(said)


def test_other_codes_that_are_worse_are_not_safe(two_codes) -> None:
    two_codes.decoder = Bias(-0.25, lambda x: x)  # that of 0.75 gives 0.5
    result = check_half_precision(two_codes, torch.full((1, 3, 8, 8), 0.5001))
    assert result.flipped == 1.0
    assert result.psnr_cost > 40 and not result.safe


def test_codes_that_stay_are_safe(two_codes) -> None:
    result = check_half_precision(two_codes, torch.full((1, 3, 8, 8), 0.3))
    assert (result.flipped, result.psnr, result.safe) == (0.0, math.inf, True)
    assert str(result).endswith("reconstruction with a PSNR of inf dB against float32")


@pytest.mark.parametrize(
    ("max_activation", "psnr", "safe"),
    [(16376.0, 40.0, True), (16377.0, 60.0, False), (10.0, 39.9, False), (10.0, math.nan, False)],
)
def test_limits(max_activation: float, psnr: float, safe: bool) -> None:
    assert HalfPrecision(max_activation, psnr).safe is safe


@pytest.mark.parametrize(
    ("max_activation", "cost", "safe"),
    [(16376.0, 0.1, True), (16377.0, 0.0, False), (10.0, 0.11, False), (10.0, math.nan, False)],
)
def test_limits_of_tokenizers(max_activation: float, cost: float, safe: bool) -> None:
    assert HalfPrecision(max_activation, 15.0, cost, flipped=0.5).safe is safe
    assert not HalfPrecision(max_activation, 15.0, cost).safe


@pytest.mark.parametrize(("cost", "safe"), [(0.1, True), (0.11, False), (math.nan, False)])
def test_limits_of_bfloat16(cost: float, safe: bool) -> None:
    assert HalfPrecision(1e6, 30.0, cost, BFLOAT16).safe is safe
