"""Exports in diffusers' own tiles: `enable_tiling()` must change no size and no place."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

import latentvae.export.continuous as export_module
from latentvae.export import export_autoencoder
from latentvae.export.tiles import fitting_sample_size, misfit_of_tiles
from latentvae.latents import latent_statistics
from tests.tiny import dc


def kl(f: int, *, sample_size: int = 32) -> AutoencoderKL:
    torch.manual_seed(0)
    levels = f.bit_length()
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        sample_size=sample_size,
    )
    return net.eval()


# By the rule that a quarter of a tile, its overlap, is a whole number of latent positions.
SIZES = [(2, 36, 40), (8, 200, 224), (16, 96, 128), (32, 64, 128), (8, 256, 256), (4, 90, 96)]


@pytest.mark.parametrize(("f", "side", "sample_size"), SIZES)
def test_the_next_size_whose_tiles_fit_is_taken(f: int, side: int, sample_size: int) -> None:
    net = kl(f, sample_size=side)
    assert fitting_sample_size(net, side) == sample_size
    assert bool(misfit_of_tiles(net, f=f)) == (side != sample_size)
    assert misfit_of_tiles(kl(f, sample_size=sample_size), f=f) == ""


def test_a_class_with_tiles_of_its_own_keeps_the_side() -> None:
    net = dc()
    f = net.spatial_compression_ratio
    assert fitting_sample_size(net, 100) == 100
    assert misfit_of_tiles(net, f=f) == ""


def test_an_export_of_an_odd_side_works_in_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images = kl(2), torch.rand(2, 3, 36, 36) * 2 - 1
    statistics = latent_statistics(net, [images])

    def export(name: str) -> None:
        export_autoencoder(
            net, tmp_path / name, statistics=statistics, sample_size=36, probe=images
        )

    export("right")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "right").eval()
    loaded.enable_tiling()
    picture = torch.rand(1, 3, 88, 88) * 2 - 1
    with torch.no_grad():
        z = loaded.encode(picture).latent_dist.mode()
        assert z.shape[2:] == (44, 44)
        assert loaded.decode(z).sample.shape == picture.shape
    assert loaded.config.sample_size == 40
    assert "at 36 pixels" in (tmp_path / "right" / "README.md").read_text()

    monkeypatch.setattr(export_module, "fitting_sample_size", lambda net, side: side)
    with pytest.raises(RuntimeError, match=r"does not work in tiles: .* multiple of 8"):
        export("wrong")
    assert not (tmp_path / "wrong").exists()
