"""A network with a likelihood is an autoencoder for the rest of the package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import latentvae
from latentvae.cli.main import main
from latentvae.errors import UserError
from latentvae.models.dense.class_network import ClassVAE
from latentvae.models.hierarchical.network import HierarchicalVAE
from tests.models.dense.test_vector_vae import vae
from tests.tasks.likelihood.small import HIERARCHY, SIDE, write_bars


def network(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "classes":
        return ClassVAE(image_height=SIDE, image_width=SIDE, num_classes=3, latent_units=4).eval()
    if kind != "hierarchical":
        return vae(kind, height=SIDE, width=SIDE)
    options = {k: v for k, v in HIERARCHY.items() if k != "architecture"}
    return HierarchicalVAE(
        image_channels=1, sample_size=SIDE, likelihood="bernoulli", **options
    ).eval()


@pytest.mark.parametrize("kind", ["one", "two", "iaf", "hierarchical", "classes"])
def test_encode_and_decode_are_the_reconstruction(kind: str, tmp_path: Path) -> None:
    net = network(kind)
    net.save_pretrained(tmp_path)
    model = latentvae.load(tmp_path, device="cpu")
    images = torch.randint(0, 2, (3, 1, SIDE, SIDE)).float() * 2 - 1
    z = model.encode(images)
    assert z.shape == (3, model.latent_channels, 1, 1) and model.f == SIDE
    with torch.no_grad():
        assert torch.allclose(model.decode(z), net.reconstruct(images), atol=1e-5)

    draws = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    one, same, other = (model.encode(images, sample=True, generator=g) for g in draws)
    assert torch.equal(one, same) and not torch.allclose(one, other)
    mean, logvar = model.encode_posterior(images)
    assert torch.equal(mean, z) and (logvar is None) == (kind != "one")
    with pytest.raises(UserError, match=f"takes {SIDE} x {SIDE} images only"):
        model.encode(torch.zeros(1, 1, 16, 16))


def test_a_hierarchy_is_cached_and_decoded(tmp_path: Path) -> None:
    """`latentvae encode` and `decode`: the latents of all groups in one shard."""
    network("hierarchical").save_pretrained(tmp_path / "vae")
    bars = write_bars(tmp_path / "bars", count=4)
    paths = [str(tmp_path / name) for name in ("vae", "latents", "pictures")]
    main(["encode", paths[0], "--data", str(bars), "--resolution", str(SIDE), "--out", paths[1]])
    main(["decode", paths[1], "--out", paths[2]])
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(pictures) == 4
    assert Image.open(pictures[0]).size == (SIDE, SIDE)


def test_images_that_are_not_square_are_refused(tmp_path: Path) -> None:
    vae("one").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its images are not square"):
        latentvae.load(tmp_path, device="cpu")
