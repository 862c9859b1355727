"""Seams of decoders whose tiles are known, through diffusers' own tiling."""

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.evaluation.tiling_check import can_tile, check_tiling
from latentvae.export.tiles import misfit_of_tiles

SIZE = 192  # pixels a side


class Pool(nn.Module):
    """Images to latents: means of f x f pixels; a posterior's log-variance is 0."""

    def __init__(self, f: int, *, logvar: bool = False) -> None:
        super().__init__()
        self.f, self.logvar = f, logvar

    def forward(self, images: Tensor) -> Tensor:
        z = F.avg_pool2d(images, self.f)
        return torch.cat([z, torch.zeros_like(z)], dim=1) if self.logvar else z


class Grow(nn.Module):
    """Latents to images: each position f x f times. `drift` times the tile's mean is added, and
    `contrast` times it multiplies."""

    def __init__(self, f: int, *, drift: float = 0.0, contrast: float = 0.0) -> None:
        super().__init__()
        self.f, self.drift, self.contrast, self.tiles = f, drift, contrast, 0

    def forward(self, z: Tensor) -> Tensor:
        self.tiles += 1
        mean = z.mean(dim=(1, 2, 3), keepdim=True)
        z = z * (1 + self.contrast * mean) + self.drift * mean
        return F.interpolate(z, scale_factor=self.f)


def kl(**options: Any) -> Any:
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (4,) * 3,
    }
    net = AutoencoderKL(
        latent_channels=3,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,  # tiles of 32 positions
        **blocks,
    )
    net.encoder, net.decoder = Pool(4, logvar=True), Grow(4, **options)
    return net.eval()


def tiny(**options: Any) -> Any:
    net = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    net.encoder, net.decoder = Pool(8), Grow(8, **options)
    return net.eval()


def dc(**options: Any) -> Any:
    blocks = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {
            "block_out_channels": (8,) * 5,
            "layers_per_block": (1,) * 5,
            "qkv_multiscales": ((),) * 5,
        }.items()
    }
    net = AutoencoderDC(latent_channels=8, **blocks)
    net.encoder, net.decoder = Pool(16), Grow(16, **options)
    return net.eval()


CLASSES = [(kl, 4), (tiny, 8), (dc, 16)]


@pytest.fixture
def images() -> Tensor:
    """Bright on the right, darker at the bottom; no edge where tiles of 2/3 begin or end."""
    images = torch.full((1, 3, SIZE, SIZE), -0.4)
    images[..., 80:] = 0.5
    images[:, :, 160:] -= 0.2
    return images


@pytest.mark.parametrize(("build", "f"), CLASSES)
def test_a_local_decoder_is_the_same_in_tiles(build, f, images) -> None:
    net = build()
    net.use_tiling = True
    misfit_of_tiles(net, f=f)
    strip, before = net.decoder.tiles, dict(vars(net))
    check = check_tiling(net, [images], f=f)
    assert check is not None
    assert (check.psnr, check.max_difference, check.seam) == (math.inf, 0, 0)
    assert not check.seam_visible
    assert net.decoder.tiles == 2 * strip + 1 + 4  # whole, and 2 x 2
    assert vars(net) == before


def test_tiles_are_the_networks_own_where_the_image_is_larger(images) -> None:
    whole = check_tiling(kl(), [images], f=4)
    assert whole is not None and (whole.tile, whole.as_configured) == (128, True)
    small = check_tiling(kl(), [images[..., :96], images[:, :, :96, :96]], f=4)
    assert small is not None and (small.tile, small.as_configured) == (128, False)
    net = kl()
    net.tile_sample_min_size, net.tile_latent_min_size = 100, 25  # a quarter is no whole position
    misfit = check_tiling(net, [images], f=4)
    assert misfit is not None and not misfit.as_configured


def test_a_seam_is_as_high_as_the_drift(images) -> None:
    """No overlap: 32 and 16 of 48 positions a side, each tile lower by its own mean."""
    net = kl(drift=-1.0)
    net.tile_overlap_factor = 0.0
    z = F.avg_pool2d(images, 4)
    rows, columns = (slice(0, 32), slice(32, 48)), (slice(0, 32), slice(32, 48))
    means = torch.tensor([[z[0, :, r, c].mean() for c in columns] for r in rows])
    steps = [means[:, 0] - means[:, 1], means[0] - means[1]]
    check = check_tiling(net, [images], f=4)
    assert check is not None
    expected = torch.cat(steps).abs().max().item() * 127.5
    assert check.seam == pytest.approx(expected, abs=0.5)  # 8-bit rounding
    assert check.seam_visible
    largest = (means - z.mean()).abs().max().item() * 127.5
    assert check.max_difference == pytest.approx(largest, abs=1.01)
    error = means - z.mean()
    areas = torch.tensor([[4.0, 2.0], [2.0, 1.0]]) / 9
    mse = (error.square() * areas).sum().item()
    assert check.psnr == pytest.approx(10 * math.log10(4 / mse), abs=0.1)


@pytest.mark.parametrize(("build", "f"), CLASSES)
def test_blending_hides_a_drift(build, f, images) -> None:
    """Two tiles side by side: one goes over into the other evenly."""
    check = check_tiling(build(drift=-1.0), [images[:, :, :64]], f=f)
    assert check is not None
    assert check.max_difference > 15
    assert check.seam < 0.5


def test_a_crossing_of_four_tiles_is_seen(images) -> None:
    """diffusers blends twice there: at t of the overlap t (1 - t) of the drift is left, 1/6 of it
    over the overlap's 32 pixels. It fades away in 32, by 1.5 over the first 4 and 4 between sides.
    """
    images = images[:, :, :1].expand(-1, -1, SIZE, -1)
    z = F.avg_pool2d(images, 4)
    drift = (z[..., :32, :32].mean() - z[..., :32, 24:].mean()).abs().item() * 127.5
    check = check_tiling(kl(drift=-1.0), [images], f=4)
    assert check is not None
    assert check.seam == pytest.approx(drift / 6 * (1 - 5.5 / 32), abs=0.5)
    assert check.seam_visible


@pytest.mark.parametrize("edge", [80, 96])
def test_edges_of_the_image_are_no_seams(edge, images) -> None:
    """Tiles of another contrast make an edge higher, also one where a tile begins (96)."""
    images = images[:, :, :64].roll(edge - 80, dims=3)
    check = check_tiling(kl(contrast=0.5), [images], f=4)
    assert check is not None
    assert check.max_difference > 10
    assert check.seam < 2.0


def test_the_worst_of_several_images_of_different_sizes(images) -> None:
    net = kl(drift=-1.0)
    net.tile_overlap_factor = 0.0
    flat = torch.zeros(2, 3, 96, 64)
    one, both = (check_tiling(net, batch, f=4) for batch in ([images], [flat, images]))
    assert one is not None and both is not None
    assert (both.seam, both.max_difference) == (one.seam, one.max_difference)
    share = SIZE**2 / (SIZE**2 + 2 * 96 * 64)
    assert both.psnr == pytest.approx(one.psnr - 10 * math.log10(share))
    assert (one.num_images, both.num_images) == (1, 3)


def test_settings_come_back_after_an_error(images) -> None:
    net = kl()
    before = dict(vars(net))

    def fail(module: Any, inputs: Any) -> None:
        if net.use_tiling:
            raise RuntimeError("no tiles")

    net.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no tiles"):
        check_tiling(net, [images], f=4)
    assert vars(net) == before


def test_what_cannot_be_tiled(images) -> None:
    assert check_tiling(VQModel(norm_num_groups=32).eval(), [images[..., :8, :8]], f=1) is None
    small = images[..., :16, :16]
    assert can_tile(kl(), f=4)
    assert check_tiling(kl(), [small], f=4) is None  # 4 positions: one tile is the least
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    assert not can_tile(AutoencoderTiny(**blocks, **counts), f=2)  # diffusers takes it for 8


def test_a_broken_decoder_is_an_error(images) -> None:
    with pytest.raises(ValueError, match="not finite"):
        check_tiling(kl(drift=math.inf), [images], f=4)
