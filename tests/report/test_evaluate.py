"""The report of models that are known exactly, and the codecs beside them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from latentvae.errors import UserError
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.metrics import ssim
from latentvae.report import CODECS, Codec, Report, measure
from latentvae.report.codecs import bits_per_pixel, encode_at_rate
from latentvae.report.evaluate import Row, raw_bpp, to_picture

FEW = {"jpeg": Codec("JPEG", (20, 90))}


class Shift:
    """A "model" that adds a constant: its PSNR is known."""

    def __init__(self, offset: float = 0.0, *, f: int = 8, latent_channels: int = 4) -> None:
        self.offset, self.f, self.latent_channels = offset, f, latent_channels

    def reconstruct(self, images: Tensor) -> Tensor:
        return images + self.offset

    def info(self) -> dict[str, Any]:
        return {"offset": self.offset}


@pytest.fixture(scope="module")
def lpips() -> dict[str, PerceptualLoss]:
    return {"alex": PerceptualLoss(load_lpips("alex"))}


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """A photograph without black or white, so that a shift is not clamped."""
    part = data.chelsea()[100 : 100 + height, 100 : 100 + width]
    return Image.fromarray(np.clip(part, 40, 215))


def test_psnr_of_a_shift_by_three_levels_is_exact(lpips: dict[str, PerceptualLoss]) -> None:
    models = {"shift": Shift(3 * 2 / 255)}
    report = measure(models, [("a", photo())], lpips=lpips, codecs={})
    metrics = report.models["shift"].metrics
    assert metrics.psnr is not None
    assert metrics.psnr.mean == pytest.approx(20 * np.log10(255 / 3), rel=1e-4)
    assert metrics.ms_ssim is None and metrics.lpips_vgg is None
    assert report.models["shift"].info == {"offset": 6 / 255}


def test_values_are_those_of_the_rounded_picture(lpips: dict[str, PerceptualLoss]) -> None:
    report = measure({"a": Shift(0.3 * 2 / 255)}, [("a", photo())], lpips=lpips, codecs={})
    assert report.models["a"].metrics.psnr is not None
    assert report.models["a"].metrics.psnr.mean == 100.0  # a third of a level rounds to none


def test_means_are_over_images(lpips: dict[str, PerceptualLoss]) -> None:
    pictures = [("a", photo()), ("b", photo(96, 40))]
    rows: list[Row] = []
    report = measure({"m": Shift(0.1)}, pictures, lpips=lpips, codecs=FEW, on_rows=rows.extend)
    of_model = [row for row in rows if row.coder == "m"]
    assert [(row.image, row.width, row.height) for row in of_model] == [
        ("a", 64, 48),
        ("b", 96, 40),
    ]
    metrics, point = report.models["m"].metrics, report.codecs["jpeg"][1]
    assert metrics.ssim is not None and metrics.ssim.images == 2
    assert metrics.ssim.mean == pytest.approx(np.mean([row.ssim or 0.0 for row in of_model]))
    at_90 = [row for row in rows if row.quality == 90]
    assert point.bpp == pytest.approx(np.mean([row.bpp for row in at_90]))
    assert point.lpips_alex == pytest.approx(np.mean([row.lpips_alex or 0.0 for row in at_90]))


def test_codec_rows_are_of_real_files(lpips: dict[str, PerceptualLoss]) -> None:
    rows: list[Row] = []
    measure({}, [("a", photo())], lpips=lpips, codecs=FEW, on_rows=rows.extend)
    buffer = io.BytesIO()
    photo().save(buffer, format="JPEG", quality=20)
    decoded = np.asarray(Image.open(buffer), dtype=np.float64)
    error = np.mean((decoded - np.asarray(photo(), dtype=np.float64)) ** 2)
    assert rows[0].bpp == 8 * len(buffer.getvalue()) / (64 * 48)
    assert rows[0].psnr == pytest.approx(10 * np.log10(255**2 / error), rel=1e-4)


@pytest.mark.parametrize(
    ("size", "f", "channels", "bpp"),
    [((256, 256), 8, 4, 1.0), ((256, 256), 8, 16, 4.0), ((9, 16), 8, 4, 4 * 2 * 2 * 16 / (9 * 16))],
)
def test_raw_bpp(size: tuple[int, int], f: int, channels: int, bpp: float) -> None:
    assert raw_bpp(Shift(f=f, latent_channels=channels), *size) == bpp


def test_small_images_leave_out_what_they_do_not_allow(lpips: dict[str, PerceptualLoss]) -> None:
    pictures = [("tiny", photo(8, 8)), ("small", photo(40, 40))]
    metrics = measure({"m": Shift(0.1)}, pictures, lpips=lpips, codecs=FEW).models["m"].metrics
    assert metrics.psnr is not None and metrics.psnr.images == 2
    assert metrics.ssim is not None and metrics.ssim.images == 1
    assert metrics.lpips_alex is not None and metrics.lpips_alex.images == 1


def test_resolution_is_shorter_side_and_centre(lpips: dict[str, PerceptualLoss]) -> None:
    rows: list[Row] = []
    pictures = [("a", photo(96, 48))]
    report = measure(
        {"m": Shift()}, pictures, lpips=lpips, codecs=FEW, resolution=32, on_rows=rows.extend
    )
    assert {(row.width, row.height) for row in rows} == {(32, 32)}
    assert "32" in report.protocol["size"] and report.data["commonest_sizes"] == {"32x32": 1}


def test_report_survives_its_file_and_leaves_out_absent_parts(
    tmp_path: Path, lpips: dict[str, PerceptualLoss]
) -> None:
    report = measure({"m": Shift(0.1)}, [("a", photo())], lpips=lpips, codecs=FEW)
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report
    raw = json.loads((tmp_path / "report.json").read_text())
    assert list(raw) == ["schema_version", "protocol", "data", "models", "codecs"]
    assert raw["schema_version"] == 1 and raw == report.to_dict()
    assert set(raw["models"]["m"]["metrics"]) == {"psnr", "ssim", "lpips_alex"}
    assert set(raw["models"]["m"]["metrics"]["psnr"]) == {"mean", "ci95", "images"}
    assert set(raw["codecs"]["jpeg"][0]) == {"bpp", "psnr", "lpips_alex", "quality"}


def test_nothing_measured_is_an_error(lpips: dict[str, PerceptualLoss]) -> None:
    with pytest.raises(UserError, match="no picture"):
        measure({"m": Shift()}, [], lpips=lpips)


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_more_quality_costs_more_and_is_closer(codec: Codec) -> None:
    source = np.asarray(photo(), dtype=float)
    files = [codec.encode(photo(), quality=quality) for quality in (5, 50, 95)]
    errors = [
        np.square(np.asarray(codec.decode(file), dtype=float) - source).mean() for file in files
    ]
    assert [len(file) for file in files] == sorted(len(file) for file in files)
    assert errors == sorted(errors, reverse=True)


def test_encode_at_rate_takes_the_smallest_file_that_is_large_enough() -> None:
    codec, picture = CODECS["jpeg"], photo()
    content, quality = encode_at_rate(codec, picture, bpp=3.0)
    assert bits_per_pixel(content, picture) >= 3.0
    assert bits_per_pixel(codec.encode(picture, quality=quality - 1), picture) < 3.0
    largest = max(len(codec.encode(picture, quality=q)) for q in range(1, 101))
    assert len(encode_at_rate(codec, picture, bpp=1000.0)[0]) == largest


def test_to_picture_keeps_the_pixels() -> None:
    pixels = np.asarray(photo())
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert np.array_equal(np.asarray(to_picture(images)), pixels)
    assert ssim(images, images).item() == pytest.approx(1.0)
