"""Grey, deep and transparent images through a whole run: training, resume, export."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from latentvae.engine.log import read_rows, sample_path
from latentvae.errors import UserError
from latentvae.tasks.autoencoder import train, update_step
from latentvae.tasks.autoencoder.images import open_data
from tests.engine.test_log import tensorboard_events
from tests.tasks.autoencoder.small import broken_off, small_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


def field(channels: int, seed: int) -> np.ndarray:
    """A smooth random field (40, 48, C) in [0, 1]."""
    rng = np.random.default_rng(seed)
    planes = [
        Image.fromarray(rng.random((5, 5), dtype=np.float32)).resize((48, 40))
        for _ in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def write_images(folder: Path, channels: int, depth: str) -> Path:
    folder.mkdir()
    for i in range(9):
        values = field(channels, i)
        if depth == "8":
            pixels = np.rint(values * 255).astype(np.uint8)
            Image.fromarray(pixels.squeeze()).save(folder / f"{i}.png")
        elif depth == "16":
            np.save(folder / f"{i}.npy", np.rint(values * 65535).astype(np.uint16))
        else:
            np.save(folder / f"{i}.npy", (values * 4000 - 1000).astype(np.float32))
    return folder


@pytest.mark.parametrize(
    ("channels", "depth"),
    [
        pytest.param(1, "float", marks=pytest.mark.slow),
        (4, "8"),
        pytest.param(1, "8", marks=pytest.mark.slow),
        pytest.param(3, "16", marks=pytest.mark.slow),
    ],
)
def test_every_kind_trains_resumes_to_the_bit_and_exports(
    channels: int, depth: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "train_data_dir": str(write_images(tmp_path / "images", channels, depth)),
        "image_channels": channels,
        "disc_start": 1,  # the discriminator learns in the second update
        "disc_augment": ("color",),
        "checkpointing_steps": 1,
        "max_train_steps": 2,
    }
    if channels == 1 and depth == "8" and importlib.util.find_spec("tensorboard"):
        options["report_to"] = "tensorboard"
    if depth == "float":
        options["value_range"] = (-1000, 3000)
    whole = train(small_config(tmp_path / "whole", **options))
    broken_off(tmp_path / "whole", tmp_path / "broken", update=1)
    broken = train(small_config(tmp_path / "broken", **options))
    expected, found = (load_file(export / WEIGHTS) for export in (whole, broken))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())

    net: Any = AutoencoderKL.from_pretrained(whole)
    assert (net.config["in_channels"], net.config["out_channels"]) == (channels, channels)
    assert net(torch.zeros(1, channels, 32, 32)).sample.shape == (1, channels, 32, 32)
    assert f"(B, {channels}, H, W)" in (whole / "README.md").read_text()
    rows = read_rows(tmp_path / "whole" / "log.jsonl")
    last = next(row for row in rows if "loss/lpips" in row)
    assert last["loss/lpips"] > 0 and last["discriminator/loss"] > 0
    grid = Image.open(sample_path(tmp_path / "whole", 2))
    assert grid.mode == ("L" if channels == 1 else "RGB")
    if "report_to" in options:  # which shows colours alone
        shown = tensorboard_events(tmp_path / "whole").Images("validation/samples")[-1]
        seen = Image.open(io.BytesIO(shown.encoded_image_string))
        assert np.array_equal(np.asarray(seen), np.asarray(grid.convert("RGB")))


def test_backgrounds_are_the_same_after_a_resume_and_change_between_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []

    def recording(images: torch.Tensor) -> torch.Tensor:
        background = original(images)
        assert isinstance(background, torch.Tensor)
        drawn.append(background)
        return background

    original = update_step.random_background
    monkeypatch.setattr(update_step, "random_background", recording)
    options: dict[str, Any] = {
        "train_data_dir": str(write_images(tmp_path / "images", 4, "8")),
        "image_channels": 4,
        "disc_scale": 0,
        "checkpointing_steps": 1,
        "max_train_steps": 2,
    }
    train(small_config(tmp_path / "whole", **options))
    whole, drawn = drawn[:], []
    broken_off(tmp_path / "whole", tmp_path / "broken", update=1)
    train(small_config(tmp_path / "broken", **options))
    assert len(whole) == 4 and len(drawn) == 2 and all(map(torch.equal, whole[2:], drawn))
    assert len(torch.cat(whole).unique()) == torch.cat(whole).numel()


def test_a_base_must_have_the_same_channels(tmp_path: Path) -> None:
    options: dict[str, Any] = {"disc_scale": 0, "max_train_steps": 1, "lr_scheduler": "constant"}
    base = train(small_config(tmp_path / "base", image_channels=1, **options))
    options |= {"pretrained_model_name_or_path": str(base)}
    with pytest.raises(UserError, match="1-channel images, but image_channels is 3"):
        train(small_config(tmp_path / "rgb", **options))
    export = train(small_config(tmp_path / "grey", image_channels=1, **options))
    assert AutoencoderKL.load_config(export)["in_channels"] == 1


def test_float_images_without_a_range_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 1, "float")
    config = small_config(tmp_path / "run", train_data_dir=str(folder), image_channels=1)
    with pytest.raises(UserError, match=r"none of .* floats: value_range must say"):
        train(config)


def test_mixed_depths_of_one_folder_are_equally_bright(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    grey = np.full((40, 40), 51, dtype=np.uint8)
    Image.fromarray(grey).save(folder / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "16.png")
    Image.fromarray(np.stack([grey] * 3, axis=2)).save(folder / "rgb.png")
    np.save(folder / "wide.npy", grey.astype(np.int32) * 257)
    config = small_config(
        tmp_path / "run", train_data_dir=str(folder), image_channels=1, validation_share=0.1
    )
    from latentvae.data import to_tensor

    training, validation = open_data(config)
    images = [to_tensor(source.read(i)) for source in (training, validation)  # type: ignore
              for i in range(len(source))]  # type: ignore # fmt: skip
    assert len(images) == 4
    assert all((image + 0.6).abs().max() < 1e-6 and image.shape == (1, 40, 40) for image in images)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_channels": 2}, "image_channels must be 1"),
        ({"value_range": (3, 3)}, "value_range must be .*got 3 3"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        small_config(tmp_path, **options)
