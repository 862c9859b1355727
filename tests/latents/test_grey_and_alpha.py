"""Grey and transparent pictures through shards and back, against the model called directly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import latentvae
from latentvae.errors import UserError
from latentvae.latents.decode import decode_folder
from latentvae.latents.encode import encode_folder
from latentvae.latents.formats.shards import read_manifest
from latentvae.models import DiscreteAutoencoder
from tests.tiny import spread_vq

RANGE = (-1000.0, 3000.0)
MODES = {1: "L", 4: "RGBA"}


def grey_tokenizer() -> DiscreteAutoencoder:
    """f 2, two levels."""
    torch.manual_seed(0)
    return DiscreteAutoencoder(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        quantizer={"type": "residual", "num_codes": 16, "code_channels": 4, "num_levels": 2},
    ).eval()


def pixels_of(channels: int, seed: int) -> np.ndarray:
    """(16, 16, C) in 0..255."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (16, 16, channels), dtype=np.uint8)


def write(folder: Path, channels: int) -> Tensor:
    """Three files (of float where grey), and their pixels by hand, (3, C, 16, 16) in [-1, 1]."""
    folder.mkdir()
    images: list[Tensor] = []
    for index in range(3):
        pixels = pixels_of(channels, index)
        if channels == 1:
            stored = pixels[..., 0].astype(np.float32) / 255 * 4000 - 1000
            np.save(folder / f"{index}.npy", stored)
        else:
            Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(images)


@pytest.mark.parametrize("channels", [1, 4])
def test_tokens_and_pictures_are_those_of_the_model(channels: int, tmp_path: Path) -> None:
    net: Any = grey_tokenizer() if channels == 1 else spread_vq(image_channels=4)
    net.save_pretrained(tmp_path / "model")
    images, model = write(tmp_path / "images", channels), latentvae.load(tmp_path / "model")
    out, stated = tmp_path / "tokens", RANGE if channels == 1 else None

    # encode
    encode_folder(
        tmp_path / "model",
        tmp_path / "images",
        out,
        resolution=16,
        batch_size=3,
        value_range=stated,
    )
    content = read_manifest(out).content
    assert (content.image_channels, content.value_range) == (channels, stated)

    # compare the tokens
    expected = model.encode_tokens(images)
    assert expected.shape == ((3, 2, 8, 8) if channels == 1 else (3, 8, 8))
    assert len(expected.unique()) > 4
    dataset = latentvae.TokenDataset(out)
    assert torch.equal(torch.stack([item["indices"] for item in dataset]), expected)

    # compare the pictures
    decoded = model.decode_tokens(expected)
    assert isinstance(decoded, Tensor)
    for path, recon in zip(decode_folder(out, tmp_path / "pictures"), decoded, strict=True):
        with Image.open(path) as picture:
            assert picture.mode == MODES[channels]
            shown = np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)
        assert np.abs(shown - (recon.clamp(-1, 1).numpy() + 1) * 127.5).max() < 0.51


def test_another_range_is_another_encoding(tmp_path: Path) -> None:
    write(tmp_path / "images", 1)
    model, out = latentvae.Autoencoder(grey_tokenizer(), name="grey"), tmp_path / "tokens"
    encode_folder(model, tmp_path / "images", out, resolution=16, value_range=RANGE)
    before = (out / "manifest.json").read_bytes()
    encode_folder(model, tmp_path / "images", out, resolution=16, value_range=(-1000, 3000))
    for other in (None, (0, 3000)):
        with pytest.raises(UserError, match="shards with another value_range"):
            encode_folder(model, tmp_path / "images", out, resolution=16, value_range=other)
    for bad in ((3000, -1000), (0, 0), (0, float("inf")), (float("nan"), 1)):
        with pytest.raises(UserError, match=r"value_range must be .* greater one"):
            encode_folder(model, tmp_path / "images", out, resolution=16, value_range=bad)
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="value_range must say what is black and white"):
        encode_folder(model, tmp_path / "images", tmp_path / "none", resolution=16)
