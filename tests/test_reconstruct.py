"""Side-by-side pictures and the table, against the metrics computed from the saved files."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from latentvae.autoencoder import Autoencoder
from latentvae.errors import UserError
from latentvae.reconstruct import GAP, reconstruct
from tests.icc import ADOBE_RGB


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    net = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    return Autoencoder(net, name="tiny")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(data.astronaut()).resize((61, 47)).save(folder / "a.png")
    Image.fromarray(data.coffee()).resize((40, 33)).save(folder / "a.jpg")
    Image.fromarray(data.chelsea()).resize((9, 8)).save(folder / "sub" / "small.png")
    (folder / "bad.jpg").write_bytes(b"<html>")
    return folder


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "table.csv").open(newline="") as file:
        return {row["picture"]: row for row in csv.DictReader(file)}


def test_pictures_and_table_agree(model: Autoencoder, photos: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    result = reconstruct(model, [photos], out=out)
    table = rows(out)
    assert set(table) == {"a.png", "a-2.png", "sub/small.png"}
    assert {row.picture for row in result.rows} == set(table)
    assert [Path(path).name for path, _ in result.left_out] == ["bad.jpg"]

    for name, row in table.items():
        width, height = int(row["width"]), int(row["height"])
        sheet = np.array(Image.open(out / name))
        assert sheet.shape == (height, 3 * width + 2 * GAP, 3)
        original, recon = sheet[:, :width], sheet[:, width + GAP : 2 * width + GAP]
        assert np.array_equal(original, np.array(Image.open(row["image"])))
        assert np.array_equal(recon, np.array(model.reconstruct(Image.open(row["image"]))))
        psnr = peak_signal_noise_ratio(original, recon, data_range=255)
        assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-3)
        difference = sheet[:, 2 * (width + GAP) :].astype(float) - 127.5
        expected = (4 * (recon.astype(float) - original) / 2).clip(-127.5, 127.5)
        assert np.abs(difference - expected).max() <= 0.51

    assert table["a.png"]["lpips_alex"] != ""
    assert table["sub/small.png"]["ssim"] == table["sub/small.png"]["lpips_alex"] == ""
    screen = capsys.readouterr().out
    assert "bad.jpg" in screen
    assert "mean of 3" in screen
    assert "1 left out" in screen
    assert "sub/small.png" in screen  # of a long path, the end is shown


def test_a_picture_smaller_than_f_of_a_tokenizer_is_told_and_left_out(
    photos: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 5,
        "up_block_types": ("UpDecoderBlock2D",) * 5,
    }
    net = VQModel(block_out_channels=(4,) * 5, norm_num_groups=4, num_vq_embeddings=8, **blocks)
    result = reconstruct(Autoencoder(net, name="vq"), [photos], out=tmp_path / "out")
    assert set(rows(tmp_path / "out")) == {"a.png", "a-2.png"}
    reasons = {Path(path).name: reason for path, reason in result.left_out}
    assert reasons["small.png"] == "9 x 8 pixels are too small: each side needs at least 16 pixels"


def test_a_picture_that_a_network_cannot_compute_does_not_lose_the_others(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one pixel each group of a group norm may have one value, which torch refuses."""
    Image.new("RGB", (1, 1)).save(photos / "0.png")
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    }
    net = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, **blocks)
    result = reconstruct(Autoencoder(net, name="kl"), [photos], out=tmp_path / "out")
    assert set(rows(tmp_path / "out")) == {"a.png", "a-2.png", "sub/small.png"}
    reasons = {Path(path).name: reason for path, reason in result.left_out}
    assert reasons["0.png"].startswith("1 x 1 pixels cannot be reconstructed: Expected more than 1")
    assert "0.png: 1 x 1 pixels" in capsys.readouterr().out


def test_the_limit_of_pixels_is_said_and_can_be_raised(
    model: Autoencoder, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    inputs, out = [photos / "a.png", photos / "a.jpg"], tmp_path / "out"
    result = reconstruct(model, inputs, out=out)
    ((path, reason),) = result.left_out
    assert Path(path).name == "a.png" and [row.width for row in result.rows] == [40]
    assert reason.startswith("the image has 2,867 pixels, more than the limit of 2,000.")
    assert "set max_pixels to 2867 or more" in reason
    assert len(reconstruct(model, inputs, out=out, max_pixels=2867).rows) == 2
    with pytest.raises(UserError, match=r"max_pixels must be at least 1 \(got 0\)"):
        reconstruct(model, inputs, out=out, max_pixels=0)


def test_files_and_a_model_folder(model: Autoencoder, photos: Path, tmp_path: Path) -> None:
    model.net.save_pretrained(tmp_path / "m")
    result = reconstruct(tmp_path / "m", [photos / "a.png", photos / "sub"], out=tmp_path / "out")
    assert [row.picture for row in result.rows] == ["a.png", "small.png"]


def test_an_optimised_model_says_so(
    model: Autoencoder, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.net.save_pretrained(tmp_path / "m")
    both = [
        reconstruct(tmp_path / "m", [photos / "a.png"], out=tmp_path / "out", optimize=optimize)
        for optimize in (None, "exact")
    ]
    assert both[0].rows[0].psnr == pytest.approx(both[1].rows[0].psnr, abs=0.01)
    assert capsys.readouterr().out.count("m: exact") == 1


def test_large_pictures_are_shrunk_when_asked(model: Autoencoder, photos: Path) -> None:
    result = reconstruct(model, [photos / "a.png"], out=photos.parent / "out", max_side=40)
    assert (result.rows[0].width, result.rows[0].height) == (40, 31)


def test_a_second_run_does_not_take_its_own_pictures(model: Autoencoder, photos: Path) -> None:
    out = photos / "out"
    first, second = (reconstruct(model, [photos], out=out) for _ in range(2))
    assert [row.picture for row in first.rows] == [row.picture for row in second.rows]


@pytest.mark.parametrize("inputs", [["a.png"], ["sub/small.png", "sub/../a.png"]])
def test_an_input_is_not_written_over(
    model: Autoencoder, photos: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str]
) -> None:
    monkeypatch.chdir(photos)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    with pytest.raises(UserError, match="is an input file and would be overwritten"):
        reconstruct(model, inputs, out=".")
    assert before == {path: path.read_bytes() for path in photos.rglob("*.*")}


def test_an_input_by_another_name_is_not_written_over(
    model: Autoencoder, photos: Path, tmp_path: Path
) -> None:
    """As where A.PNG and A.png are one file."""
    out = tmp_path / "out"
    out.mkdir()
    (photos / "a.png").rename(photos / "A.PNG")
    (out / "A.png").hardlink_to(photos / "A.PNG")
    with pytest.raises(UserError, match="is an input file and would be overwritten"):
        reconstruct(model, [photos / "A.PNG"], out=out)


def test_wrong_inputs_are_refused(model: Autoencoder, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="did you mean 'photos'"):
        reconstruct(model, [tmp_path / "fotos"], out=out)
    with pytest.raises(UserError, match="no images: give image files or folders"):
        reconstruct(model, [], out=out)
    with pytest.raises(UserError, match="none of the 1 pictures"):
        reconstruct(model, [photos / "bad.jpg"], out=out)
    with pytest.raises(UserError, match="no such model folder"):
        reconstruct(tmp_path / "nothing", [photos], out=out)
    assert not out.exists()


def test_colour_profiles_become_srgb_unless_they_are_ignored(model, tmp_path: Path, capsys) -> None:
    Image.new("RGB", (16, 16), (60, 180, 60)).save(tmp_path / "a.png", icc_profile=ADOBE_RGB)
    for ignored, expected in ((False, (0, 181, 42)), (True, (60, 180, 60))):
        reconstruct(model, [tmp_path / "a.png"], out=tmp_path / "out", ignore_icc=ignored)
        written = Image.open(tmp_path / "out" / "a.png")
        assert written.getpixel((0, 0)) == expected and "icc_profile" not in written.info
