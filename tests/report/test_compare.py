"""The report folder: its files, its tables, and what happens to files that cannot be read."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torch import Tensor

from latentvae.data import ImageFolder
from latentvae.errors import UserError
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.report import Report, compare, unique_names
from latentvae.report.compare import spread
from latentvae.report.figures import CAPTION_HEIGHT, CROP, MARGIN, Tile, sheet
from latentvae.report.schema import Point
from latentvae.report.tables import codecs_table, models_table, point_at_rate


class Dim:
    """A "model" that halves the contrast."""

    f, latent_channels = 8, 4

    def reconstruct(self, images: Tensor) -> Tensor:
        return images / 2

    def info(self) -> dict[str, str]:
        return {}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The report on two generated images and one broken file."""
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("out") / "report"
    y, x = np.mgrid[:40, :48] / 48
    for i in range(2):
        wave = np.stack([np.sin(9 * x + i), np.cos(7 * y), np.sin(5 * x * y)], axis=-1)
        Image.fromarray((wave * 90 + 128).astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"<html>")
    lpips = {"alex": PerceptualLoss(load_lpips("alex"))}
    source = ImageFolder(folder)
    return out, compare({"dim": Dim()}, source, out, data_name="waves", lpips=lpips, sheet_images=2)


def test_writes_the_four_files(written: tuple[Path, Report]) -> None:
    out, report = written
    assert Report.read(out / "report.json") == report
    with (out / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    num_points = sum(len(points) for points in report.codecs.values())
    assert len(rows) == 2 * (1 + num_points)
    assert [row["image"] for row in rows if row["kind"] == "model"] == ["0.png", "1.png"]
    with Image.open(out / "rate.png") as figure:
        assert figure.width > 1000
    with Image.open(out / "sheet.png") as picture:
        scale = CROP // 48
        assert picture.width == 3 * (48 * scale + MARGIN) + MARGIN
        assert picture.height == 2 * (40 * scale + CAPTION_HEIGHT) + MARGIN


def test_a_broken_file_is_named_and_left_out(written: tuple[Path, Report]) -> None:
    data = written[1].data
    assert (data["source"], data["num_images"], data["unreadable"]) == ("waves", 2, ["broken.png"])


def test_tables_show_the_numbers(written: tuple[Path, Report]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(models_table(written[1]), codecs_table(written[1]))
    shown, metrics = console.export_text(), written[1].models["dim"].metrics
    assert metrics.psnr is not None and f"{metrics.psnr.mean:.2f}" in shown
    assert "n/a" in shown and "jpeg" in shown and "webp" in shown


def test_point_at_rate_is_the_cheapest_not_below() -> None:
    points = [Point(bpp=bpp, psnr=30.0) for bpp in (0.5, 2.0, 1.0)]
    assert [point_at_rate(points, bpp).bpp for bpp in (0.1, 0.6, 1.0, 9.0)] == [0.5, 1.0, 1.0, 2.0]


def test_spread_is_even_and_starts_at_the_first() -> None:
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, None) == spread(3, 7) == [0, 1, 2]
    with pytest.raises(UserError, match="at least 1"):
        spread(3, 0)


def test_unique_names_take_as_much_of_the_path_as_needed() -> None:
    assert unique_names([Path("a/export"), Path("b/kl")]) == ["export", "kl"]
    assert unique_names([Path("a/export"), Path("b/export")]) == ["a/export", "b/export"]
    with pytest.raises(UserError, match="twice"):
        unique_names([Path("a"), Path("a")])


def test_a_sheet_shows_the_middle_at_whole_pixels(tmp_path: Path) -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 700, 3), np.uint8))
    sheet([[Tile(large, "large")]], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        shown = picture.crop((MARGIN, CAPTION_HEIGHT, MARGIN + CROP, CAPTION_HEIGHT + CROP))
    assert np.array_equal(np.asarray(shown), np.asarray(large)[90:410, 190:510])
