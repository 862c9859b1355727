"""Pictures in two classes, a tiny tokenizer, and a tiny KL autoencoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latentvae.autoencoder import Autoencoder
from tests.tiny import BLOCKS, spread_vq


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    spread_vq().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def kl() -> Autoencoder:
    torch.manual_seed(0)
    net = AutoencoderKL(**BLOCKS, latent_channels=4, scaling_factor=0.5, shift_factor=0.25)
    return Autoencoder(net, name="kl")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures in classes a and b, and two files that are none; b/zz.jpg is the last."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(11):
        noise = np.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        path = root / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise).resize((20 + index, 30 - index)).save(path)
    (root / "a" / "05.jpg").write_bytes(b"<html>")
    (root / "b" / "zz.jpg").write_bytes(b"")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
