"""The warnings that constructed networks deserve, and no others."""

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.evaluation.passport import passport

BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8,) * 3,
    "norm_num_groups": 4,
}


@pytest.fixture
def net() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(**BLOCKS).eval()


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((64, 64), (32, 64))
    return [torch.rand(1, 3, *size, generator=generator) * 2 - 1 for size in sizes]


class Shift(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


class Centre(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z - z.mean()


class Shifting(nn.Module):
    """Latents to images of f 4, through latents that are `peak` higher."""

    def __init__(self, peak: float) -> None:
        super().__init__()
        self.first, self.second, self.grow = Shift(peak), Shift(-peak), nn.Upsample(scale_factor=4)

    def forward(self, z: Tensor) -> Tensor:
        return self.grow(self.second(self.first(z)))


class Pool(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        mean = F.avg_pool2d(images, 4)
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)


def shifting(peak: float) -> Any:
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 3}
    net = AutoencoderKL(**BLOCKS, **plain)
    net.encoder, net.decoder = Pool(), Shifting(peak)
    return net.eval()


def test_a_sound_network_has_no_warnings(images) -> None:
    result = passport(shifting(1.0), images, f=4)
    assert result["warnings"] == []
    precision = result["precision"]
    for dtype in ("float16", "bfloat16"):
        assert precision[dtype]["safe"] and precision[dtype]["finite"]
        assert abs(precision[dtype]["psnr_cost"]) < 0.1
    assert precision["float16"]["psnr"] > precision["bfloat16"]["psnr"] + 10
    assert result["tiling"] == {
        "supported": True,
        "fits": True,
        "psnr": math.inf,
        "max_difference": 0.0,
        "seam": 0.0,
        "seam_visible": False,
        "num_images": 2,
        "tile": 32,
        "as_configured": True,
    }


def test_the_largest_layers_come_first_and_once(net, images) -> None:
    with torch.no_grad():
        net.decoder.up_blocks[0].resnets[1].conv2.bias[0] = 500.0
    result = passport(net, images, f=4)
    names, peaks = list(result["layers"]), list(result["layers"].values())
    assert len(names) == 10
    assert peaks == sorted(peaks, reverse=True)
    assert result["max_activation"] == peaks[0] > 500
    assert "decoder.up_blocks.0.resnets.1" in names
    # Blocks that end with one of the others, and the whole decoder.
    assert not {"decoder.up_blocks.2", "decoder", "reconstruction"} & set(names)


def test_an_overflow_is_named(net, images) -> None:
    with torch.no_grad():
        net.decoder.conv_in.bias[0] = 1e5
    result = passport(net, images, f=4)
    assert not result["precision"]["float16"]["safe"]
    assert result["precision"]["float16"]["psnr"] is None
    assert result["precision"]["float16"]["finite"] is False
    [warning, *_] = result["warnings"]
    assert "float16 overflows: the output of decoder." in warning
    assert "above float16's maximum 65504" in warning
    largest = next(iter(result["layers"]))
    assert largest in warning
    assert result["layers"][largest] > 9e4


@pytest.mark.parametrize(
    ("peak", "warning"),
    [
        (2e4, "float16 is not safe: the output of decoder.first reaches 2e+04, less than a factor"),
        (1.5e4, "float16 is not safe: the reconstructions have "),
    ],
)
def test_float16_is_unsafe_near_its_maximum_or_where_it_differs(peak, warning, images) -> None:
    """`first` adds a peak to the latents that `second` takes away."""
    result = passport(shifting(peak), images, f=4)
    [text] = [w for w in result["warnings"] if w.startswith("float16")]
    assert text.startswith(warning)


def test_a_costly_bfloat16_is_said(images) -> None:
    """Beside 50, bfloat16 keeps steps of 1/4."""
    result = passport(shifting(50.0), [i * 0.1 for i in images], f=4)
    verdict = result["precision"]["bfloat16"]
    assert result["precision"]["float16"]["safe"]
    assert verdict["finite"] and not verdict["safe"]
    against = f"have {verdict['psnr']:.1f} dB PSNR against those of float32"
    cost = f"{verdict['psnr_cost']:.2f} dB less PSNR against the images"
    assert result["warnings"] == [
        f"bfloat16 loses quality: the reconstructions {against}, and {cost}"
    ]
    assert verdict["psnr_cost"] > 0.1


def test_a_seam_is_said() -> None:
    """Two tiles without overlap, each less its own mean."""
    net = shifting(1.0)
    net.tile_overlap_factor = 0.0
    net.tile_sample_min_size, net.tile_latent_min_size = 44, 11
    net.decoder.first, net.decoder.second = Centre(), nn.Identity()
    images = [torch.cat([torch.full((1, 3, 16, 24), -0.5), torch.full((1, 3, 16, 40), 0.5)], dim=3)]
    result = passport(net, images, f=4)
    # The first tile ends at 44 of 64 pixels: 24 dark ones and 20 that are as bright as the second.
    assert result["tiling"]["seam"] == pytest.approx(24 / 44 * 127.5, abs=1)
    seam = f"{result['tiling']['seam']:.1f}"
    assert result["warnings"][-1] == (
        f"tiles leave visible seams: a step of {seam} of 255 levels at tile borders"
    )


def test_a_tokenizer_does_not_tile(images) -> None:
    torch.manual_seed(0)
    net = VQModel(**BLOCKS, num_vq_embeddings=8).eval()
    assert passport(net, images, f=4)["tiling"] == {"supported": False}


def test_small_images_leave_tiling_open(net, images) -> None:
    found = passport(net, [images[0][..., :8, :8]], f=4)["tiling"]
    assert found == {"supported": True, "fits": True}


def test_tiles_that_do_not_fit_together_are_said(images) -> None:
    net = shifting(1.0)
    net.tile_sample_min_size, net.tile_latent_min_size = 36, 9
    result = passport(net, images, f=4)
    assert result["tiling"]["fits"] is False
    (warning,) = result["warnings"]
    assert warning.startswith("enable_tiling()") and "multiple of 16" in warning


def test_a_network_broken_in_float32_is_an_error(net, images) -> None:
    with torch.no_grad():
        net.decoder.conv_out.bias[0] = math.inf
    with pytest.raises(ValueError, match="float32 reconstructions are not finite"):
        passport(net, images, f=4)
