"""A run of VQ-VAE-2: it resumes exactly, its card's lines run, and its tokens come back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import latentvae
from latentvae.engine.log import read_rows
from latentvae.latents.decode import decode_folder
from latentvae.latents.encode import encode_folder
from latentvae.latents.formats.shards import read_manifest
from latentvae.models.levels import split_levels
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.config import TrainConfig
from tests.tasks.autoencoder.small import broken_off, small_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
CODEBOOK = {"type": "vq", "num_codes": 32, "code_channels": 4, "codebook_decay": 0.8}
MODEL: dict[str, Any] = {
    "architecture": "vqvae2",
    "block_out_channels": [8, 8, 8],
    "layers_per_block": 1,
    "residual_channels": 4,
    "latent_channels": 8,
    "quantizer": {**CODEBOOK, "restart_threshold": 0.2, "kmeans_iterations": 2},
}


def config(folder: Path) -> TrainConfig:
    options: dict[str, Any] = {"learn_logvar": False, "max_train_steps": 3, "log_steps": 1}
    return small_config(folder, model=MODEL, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config(folder))
    return folder


@pytest.fixture(scope="module")
def tokens(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    encode_folder(run / "export", "samples", out, resolution=(32, 48), shard_items=5)
    return out


def test_a_run_goes_on_to_the_bit(run: Path, tmp_path: Path) -> None:
    broken_off(run, tmp_path / "broken", update=2)
    broken = train(config(tmp_path / "broken"))
    expected, found = load_file(run / "export" / WEIGHTS), load_file(broken / WEIGHTS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_both_codebooks_learn(run: Path) -> None:
    first, last = (
        load_file(run / f"checkpoint-{update}" / "model.safetensors") for update in (2, 3)
    )
    for level in (0, 1):
        key = f"net.quantize.{level}.embed_sum"
        assert not torch.equal(first[key], last[key])
    rows = read_rows(run / "log.jsonl")
    assert all("loss/commitment" in row for row in rows if "loss/rec" in row)
    validated = [row for row in rows if "validation/psnr" in row][-1]
    assert 0 < validated["validation/usage"] <= 1


def test_the_lines_of_the_card_run(run: Path) -> None:
    export = run / "export"
    assert json.loads((export / "config.json").read_text())["_class_name"] == "VQVAE2"
    card = (export / "README.md").read_text().replace("path/to/this/folder", str(export))
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    known: dict[str, Any] = {"images": images}
    with torch.no_grad():
        exec(card.split("```python\n")[1].split("```")[0], known)
    assert [level.shape for level in known["maps"]] == [(2, 4, 6), (2, 8, 12)]
    expected = latentvae.load(export).reconstruct(images)
    assert torch.allclose(known["recon"].clamp(-1, 1), expected, atol=1e-5)


def test_images_of_any_size_have_tokens(run: Path) -> None:
    model = latentvae.load(run / "export")
    images = torch.rand(1, 3, 33, 41) * 2 - 1
    indices = model.encode_tokens(images)
    assert indices.shape == (1, 5, 5, 6)  # padded to 40 x 48
    recon = model.decode_tokens(indices, size=(33, 41))
    assert torch.allclose(torch.as_tensor(recon), model.reconstruct(images), atol=1e-5)


def test_shards_hold_all_levels(tokens: Path, run: Path) -> None:
    manifest = read_manifest(tokens)
    content, statistics = manifest.content, manifest.statistics
    assert content.item_shape == (5, 4, 6) and content.levels == ((4, 6), (8, 12))
    dataset, model = latentvae.TokenDataset(tokens), latentvae.load(run / "export")
    assert dataset.levels == content.levels and len(dataset) == manifest.num_items
    items = torch.stack([item["indices"] for item in dataset])  # type: ignore[attr-defined]
    net: Any = model.net
    for own, level in zip(net.maps(items), split_levels(items, content.levels), strict=True):
        assert torch.equal(own, level)

    # bits of each level
    top, bottom = statistics["levels"]
    assert bottom["tokens"] == 4 * top["tokens"] == 96 * len(dataset)
    assert top["raw_bpp"] == pytest.approx(5 * 24 / (32 * 48))
    assert statistics["raw_bpp"] == pytest.approx(top["raw_bpp"] + bottom["raw_bpp"])
    assert statistics["coded_bpp"] < top["coded_bpp"] + bottom["coded_bpp"]


def test_pictures_from_shards_are_the_reconstructions(
    tokens: Path, run: Path, tmp_path: Path
) -> None:
    paths = decode_folder(tokens, tmp_path / "out", batch_size=13)
    dataset, model = latentvae.TokenDataset(tokens), latentvae.load(run / "export")
    for item, path in zip(dataset, paths, strict=True):  # type: ignore[call-overload]
        picture: Any = model.decode_tokens(item["indices"][None], output_type="pil")
        difference = np.array(picture[0]).astype(int) - np.array(Image.open(path))
        assert np.abs(difference).max() <= 1
