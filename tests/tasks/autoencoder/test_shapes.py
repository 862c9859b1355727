"""Training at sizes that are not square, and in aspect-ratio buckets."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentvae.cli.train import config_from_arguments
from latentvae.engine.log import sample_path
from latentvae.engine.updates import Updates
from latentvae.errors import UserError
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.refusals import check_images
from latentvae.tasks.autoencoder.validate import LABEL_WIDTH
from tests.data.conftest import picture
from tests.tasks.autoencoder.small import as_flags, broken_off, small_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def wide_and_tall(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(21):
        size = [(60, 40), (40, 60), (48, 48)][i % 3]
        picture(*size, seed=i).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(height, width) of each micro-step from here on."""
    seen: list[tuple[int, int]] = []
    original = Updates.micro_step

    def recording(self: Any, batch: Any, *args: Any) -> Any:
        seen.append(tuple(batch.images.shape[2:]))
        return original(self, batch, *args)

    monkeypatch.setattr(Updates, "micro_step", recording)
    return seen


@pytest.mark.parametrize("disc_type", ["patch", "stylegan"])
def test_a_size_that_is_not_square(
    disc_type: str, wide_and_tall: Path, shapes: list[tuple[int, int]], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_train_steps": 2, "disc_start": 0, "disc_type": disc_type}
    options |= {"train_data_dir": str(wide_and_tall), "resolution": (32, 48)}
    export = train(small_config(tmp_path / "run", **options))
    assert shapes == [(32, 48)] * 4
    grid = Image.open(sample_path(tmp_path / "run", 2))
    assert grid.size == (LABEL_WIDTH + 4 * 48, 4 * 3 * 32)  # one image, 128 px for 32
    assert json.loads((export / "config.json").read_text())["sample_size"] == 48
    assert "32 x 48 px (height x width)" in (export / "README.md").read_text()


def test_buckets_train_and_resume_to_the_bit(
    wide_and_tall: Path, shapes: list[tuple[int, int]], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "train_data_dir": str(wide_and_tall),
        "aspect_ratio_buckets": 3,
        "resolution": 48,
        "disc_start": 1,
        "max_train_steps": 4,
    }
    whole = train(small_config(tmp_path / "whole", **options))
    straight = shapes.copy()
    assert set(straight) == {(32, 64), (48, 48), (64, 32)}
    shapes.clear()
    options["dataloader_num_workers"] = 2
    broken_off(tmp_path / "whole", tmp_path / "broken", update=2)
    broken = train(small_config(tmp_path / "broken", **options))
    assert shapes == straight[4:]
    expected, found = (load_file(export / WEIGHTS) for export in (whole, broken))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_flag_takes_one_number_or_two(tmp_path: Path) -> None:
    for value, flags in ((64, ["64"]), ((64, 96), ["64", "96"])):
        arguments = ["--config", "kl_small", "--resolution", *flags, "--crop", "center"]
        data = config_from_arguments(arguments, description="").data
        assert (data.resolution, data.crop) == (value, "center")
    config = small_config(tmp_path, resolution=(32, 48), value_range=(-1000, 3000))
    again = config_from_arguments(as_flags(config), description="")
    assert again.data == config.data and again.data.size == (32, 48)
    assert small_config(tmp_path, resolution=32).data.size == (32, 32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": (32, 50)}, "resolution 50 is not a multiple of the model's f = 4.* 52\\."),
        ({"resolution": (32, 0)}, r"resolution must be one number .* \(got \(32, 0\)\)\."),
        ({"resolution": 0}, r"resolution must be one number of pixels, or height .* \(got 0\)\."),
        ({"resolution": "32x32"}, r"resolution must be one number .* \(got '32x32'\)\."),
        ({"resolution": [32, 32, 32]}, r"resolution must be .* \(got \[32, 32, 32\]\)\."),
        ({"aspect_ratio_buckets": -1}, "aspect_ratio_buckets"),
        (
            {"aspect_ratio_buckets": 3, "streaming": True, "dataset_name": "a/b",
             "train_data_dir": None},
            "aspect_ratio_buckets 3 needs the sizes",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        small_config(tmp_path, **options)
    print(error.value)


def test_the_narrowest_bucket_must_be_large_enough(tmp_path: Path) -> None:
    options: dict[str, Any] = {"aspect_ratio_buckets": 3, "lpips_net": "vgg", "disc_scale": 0}
    config = small_config(tmp_path, **options, resolution=16)
    said = (
        r"narrowest bucket of resolution 16 has a side of 8 px, .*: LPIPS-vgg needs at least "
        r"16 px\. The smallest resolution that works is (\d+)\."
    )
    with pytest.raises(UserError, match=said) as refused:
        check_images(config)
    least = int(re.findall(r"works is (\d+)", str(refused.value))[0])
    check_images(small_config(tmp_path, **options, resolution=least))
    for smaller in range(16, least, config.model.f):
        with pytest.raises(UserError, match=f"resolution {smaller} has a side of 8"):
            check_images(small_config(tmp_path, **options, resolution=smaller))


def test_a_small_resolution_names_the_lpips_network_that_takes_it(tmp_path: Path) -> None:
    """28 px of MNIST: validation measures LPIPS also where the loss has none."""
    with pytest.raises(UserError, match=r"28 is too small: LPIPS-alex .* --lpips_net vgg \(16 px"):
        check_images(small_config(tmp_path, resolution=28, perceptual_scale=0.0))
    check_images(small_config(tmp_path, resolution=28, perceptual_scale=0.0, lpips_net="vgg"))
