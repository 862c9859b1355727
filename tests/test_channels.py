"""Grey and RGBA models in use: `load`, `reconstruct`, and what `evaluate` says."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.autoencoder import Autoencoder
from latentvae.errors import UserError
from latentvae.evaluation import evaluate
from latentvae.evaluation.settings import QUICK
from latentvae.models import build_autoencoder_kl
from latentvae.reconstruct import GAP, reconstruct


def model(channels: int) -> Autoencoder:
    torch.manual_seed(0)
    net = build_autoencoder_kl(
        block_out_channels=(8, 8), norm_num_groups=4, image_channels=channels
    )
    return Autoencoder(net, name=f"tiny{channels}")


def ramp(shape: tuple[int, ...], top: int) -> np.ndarray:
    return np.linspace(0, top, int(np.prod(shape))).reshape(shape).round()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_pictures_go_in_and_come_out_in_the_models_channels(channels: int, mode: str) -> None:
    net = model(channels)
    assert net.image_channels == channels
    photo = Image.fromarray(ramp((17, 22, 3), 255).astype(np.uint8))
    found = net.reconstruct(photo)
    assert isinstance(found, Image.Image) and (found.mode, found.size) == (mode, photo.size)
    tensor = torch.from_numpy(np.array(photo.convert(mode))).float().reshape(1, 17, 22, channels)
    same = net.reconstruct(tensor.permute(0, 3, 1, 2) / 127.5 - 1)
    expected = (same[0].permute(1, 2, 0) + 1).mul(127.5).round().squeeze().numpy()
    assert np.array_equal(np.array(found), expected)
    z = net.encode(photo)
    (decoded,) = net.decode(z, size=(17, 22), output_type="pil")  # type: ignore[misc]
    assert np.array_equal(np.array(decoded), np.array(found))


def test_16_bits_go_in_and_come_out() -> None:
    net = model(1)
    values = ramp((16, 20), 65535).astype(np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    exact = torch.from_numpy(values / 32767.5 - 1)[None, None].float()
    assert torch.allclose(net.encode(image), net.encode(exact), atol=1e-5)
    array = net.reconstruct(values[..., None])
    assert array.dtype == np.uint16 and array.shape == (16, 20, 1)
    expected = (net.reconstruct(exact).double() + 1) * 32767.5
    assert np.abs(array[..., 0] - expected[0, 0].numpy()).max() < 2
    floats = Image.fromarray(values.astype(np.float32))
    with pytest.raises(UserError, match="floats: value_range"):
        net.encode(floats)
    with pytest.raises(UserError, match=r"\(H, W, 1\) or \(B, H, W, 1\), not \(16, 20, 3\)"):
        net.encode(np.zeros((16, 20, 3), np.uint8))


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "table.csv").open(newline="") as file:
        return {row["picture"]: row for row in csv.DictReader(file)}


def test_reconstruct_with_a_grey_model(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    values = ramp((40, 50), 65535)
    Image.fromarray(values.astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray((values / 257).astype(np.uint8)).save(folder / "flat.png")
    np.save(folder / "float.npy", values)

    # without a value range
    found = reconstruct(model(1), [folder], out=tmp_path / "a")
    assert [reason for _, reason in found.left_out] == [
        "the file's values are floats: value_range must say what is black and white"
    ]

    # with a value range
    reconstruct(model(1), [folder], out=tmp_path / "b", value_range=(0, 65535))

    # compare the pictures of both
    for out, names in (("a", ["deep", "flat"]), ("b", ["deep", "float"])):
        rows = table(tmp_path / out)
        assert set(rows) >= {f"{name}.png" for name in names}
        for name in names:
            sheet = np.array(Image.open(tmp_path / out / f"{name}.png")).astype(np.float64)
            original, recon = sheet[:, :50], sheet[:, 50 + GAP : 100 + GAP]
            top = 255 if name == "flat" else 65535
            assert np.array_equal(
                original, values if top > 255 else (values / 257).astype(np.uint8)
            )
            error = 10 * np.log10(top**2 / np.square(original - recon).mean())
            assert float(rows[f"{name}.png"]["psnr"]) == pytest.approx(error, abs=1e-3)
            assert rows[f"{name}.png"]["lpips_alex"]


def test_reconstruct_with_an_rgba_model(tmp_path: Path) -> None:
    pixels = ramp((40, 50, 4), 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    reconstruct(model(4), [tmp_path / "a.png"], out=tmp_path / "out")
    sheet = np.array(Image.open(tmp_path / "out" / "a.png"))
    assert sheet.shape == (40, 3 * 50 + 2 * GAP, 4)
    assert np.array_equal(sheet[:, :50], pixels)
    assert (sheet[:, -50:, 3] == 255).all()  # the difference is opaque


def test_evaluate_measures_rgb_alone(tmp_path: Path) -> None:
    source: Any = None
    with pytest.raises(UserError, match=r"evaluate needs RGB models.*'grey' takes 1 channels"):
        evaluate(
            {"grey": model(1)}, source, tmp_path, data_name="x",
            lpips=dict.fromkeys(QUICK.lpips_nets), plan=QUICK,  # type: ignore[arg-type]
        )  # fmt: skip
