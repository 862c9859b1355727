"""The pictures of a report, and its tables on the screen."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from latentvae.evaluation.picture_source import center_crop, to_picture
from latentvae.evaluation.sheet import CAPTION_HEIGHT, CROP, MARGIN, Tile, sheet
from latentvae.report import Report
from latentvae.report.figures import rate_figure
from latentvae.report.tables import summary
from tests.evaluation.conftest import photo

MEAN = {"mean": 31.5, "ci95": [31.0, 32.0], "images": 2}
ONE = {"mean": 0.2, "images": 1}
EXACT = {"mean": "Infinity", "ci95": ["Infinity", "Infinity"], "images": 2, "infinite": 2}


@pytest.fixture
def report() -> Report:
    images = {"bpp": 2, "psnr": 1}
    curves = {"psnr": {"bpp": 0.4, "value": 30.0, "images": 1}}
    points = [
        {"bpp": 0.5, "psnr": 30.0, "images": images, "curves": curves, "quality": 20},
        {"bpp": 2.0, "psnr": "Infinity"},
    ]
    return Report.model_validate(
        {
            "protocol": {"size": "own size"},
            "data": {"num_images": 2},
            "models": {
                "fair": {
                    "metrics": {"psnr": MEAN, "lpips_alex": ONE},
                    "rate": {"raw_bpp": 1, "points": points},
                    "codecs_at_rate": {"jpeg": points[0]},
                },
                "copy": {"metrics": {"psnr": EXACT}, "rate": {"raw_bpp": 24}, "warnings": ["Hm."]},
            },
            "codecs": {"jpeg": points},
            "bd_rate": {"fair": {"psnr": 7.6}},
        }
    )


def test_tables_show_the_numbers_and_warnings(report: Report) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary(report))
    shown = console.export_text()
    shown_texts = ("31.50 ±0.50", "exact", "n/a", "jpeg", "+8 %", "warning: copy: Hm.")
    for text in (*shown_texts, "0.2000 ±n/a (1 image)", "30.00 (1 image)"):
        assert text in shown


def test_the_rate_figure_is_drawn_without_what_is_infinite(report: Report, tmp_path: Path) -> None:
    rate_figure(report, tmp_path / "rate.png")
    with Image.open(tmp_path / "rate.png") as figure:
        assert figure.width > 1000
        assert len(figure.convert("RGB").getcolors(1 << 20) or []) > 10


def test_a_sheet_shows_the_middle_at_whole_pixels(tmp_path: Path) -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 700, 3), np.uint8))
    sheet([[Tile(large, "large")]], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        shown = picture.crop((MARGIN, CAPTION_HEIGHT, MARGIN + CROP, CAPTION_HEIGHT + CROP))
    assert np.array_equal(np.asarray(shown), np.asarray(large)[90:410, 190:510])


def test_to_picture_keeps_the_pixels() -> None:
    pixels = np.asarray(photo())
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert np.array_equal(np.asarray(to_picture(images)), pixels)


@pytest.mark.parametrize(
    ("size", "expected"), [((50, 70), (40, 40)), ((20, 70), (16, 40)), ((4, 12), (8, 24))]
)
def test_center_crop_is_divided_by_f(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert center_crop(torch.zeros(1, 3, *size), side=40, multiple=8).shape[2:] == expected
