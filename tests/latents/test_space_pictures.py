"""`latentvae latents` on bright and dark pictures, whose places in latent space are known."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.autoencoder import Autoencoder
from latentvae.cli.main import main
from latentvae.data import ImageFolder, to_tensor
from latentvae.errors import UserError
from latentvae.latents import space_pictures
from latentvae.latents.items import Labels
from latentvae.latents.space_pictures import EncodedImages, draw_attribute, encode_images
from tests.models.dense.test_vector_vae import vae

CLASSES = {"bright": 200, "dark": 40}
LABELS, CELL = (
    110,
    64 + 2 * 2,
)  # width of the labels, and side of a cell with its gap, twice enlarged


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six bright and six dark pictures of noise, and a file that is none."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, level in CLASSES.items():
        (root / name).mkdir()
        for number in range(6):
            pixels = rng.integers(level - 8, level + 8, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / "dark" / "broken.png").write_bytes(b"<html>")
    return root


@pytest.fixture(scope="module")
def model(kl: Autoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "kl"
    kl.net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoded(kl: Autoencoder, pictures: Path) -> EncodedImages:
    return encode_images(kl, str(pictures), resolution=32, max_images=100)


def draw(
    use: str, model: Path, pictures: Path, out: Path, *options: str
) -> tuple[Image.Image, dict]:
    arguments = ["latents", str(model), "--data", str(pictures), use, "--out", str(out)]
    main([*arguments, "--resolution", "32", "--device", "cpu", *options])
    return Image.open(out / f"{use}.png"), json.loads((out / f"{use}.json").read_text())


def cell(picture: Image.Image, row: int, column: int) -> np.ndarray:
    """A picture of a grid at its own size, 32 x 32 pixels."""
    pixels = np.asarray(picture)[row * CELL :, LABELS + column * CELL :][:64:2, :64:2]
    return pixels[:32, :32]


def test_images_are_encoded_with_their_classes_and_scale(
    kl: Autoencoder, pictures: Path, encoded: EncodedImages
) -> None:
    assert encoded.names[0] == "bright/0.png" and len(encoded.names) == 12
    assert encoded.labels == ["bright"] * 6 + ["dark"] * 6
    image = to_tensor(ImageFolder(pictures / "dark").read(0))[None]
    assert torch.allclose(encoded.latents[6:7], kl.encode(image, scaled=True), atol=1e-5)
    recon = kl.decode(kl.encode(image), size=(32, 32))
    assert torch.allclose(encoded.decode(encoded.latents[6:7]), recon, atol=1e-4)
    some = encode_images(kl, str(pictures), resolution=32, max_images=2, also=["dark/5.png"])
    assert some.names == ["bright/0.png", "dark/0.png", "dark/5.png"]


def test_an_image_without_a_class_is_in_no_class(
    kl: Autoencoder, pictures: Path, encoded: EncodedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [0] * 6 + [1] * 5 + [-1] * 2  # the last file cannot be read
    found = Labels(numbers, ["bright", "dark"])
    monkeypatch.setattr(space_pictures, "find_labels", lambda *_, **__: found)
    some = encode_images(kl, str(pictures), resolution=32, max_images=100)
    assert some.labels == ["bright"] * 6 + ["dark"] * 5 + [None]
    with pytest.raises(UserError, match="6 of 'bright' and 0 of 'all others'"):
        alone = replace(some, labels=["bright"] * 6 + [None] * 6)
        options = {"against": None, "images": [], "count": 1, "steps": 2}
        draw_attribute(alone, Path("unused.png"), attribute="bright", **options)  # type: ignore[arg-type]

    # a column of numbers may hold -1
    monkeypatch.setattr(space_pictures, "find_labels", lambda *_, **__: Labels(numbers, None))
    some = encode_images(kl, str(pictures), resolution=32, max_images=100)
    assert some.labels == ["0"] * 6 + ["1"] * 5 + ["-1"]


def test_a_way_starts_and_ends_at_the_images(model: Path, pictures: Path, tmp_path: Path) -> None:
    picture, found = draw(
        "interpolate",
        model,
        pictures,
        tmp_path,
        "--images",
        "dark/1.png",
        "bright/2.png",
        "--steps",
        "3",
    )
    assert found["pairs"] == [["dark/1.png", "bright/2.png"]]
    assert picture.size == (LABELS + 5 * CELL, 3 * CELL)
    ends = [np.asarray(Image.open(pictures / name)) for name in found["pairs"][0]]
    for row in range(3):
        assert (cell(picture, row, 0) == ends[0]).all() and (cell(picture, row, 4) == ends[1]).all()
    fade = cell(picture, 2, 2).astype(float)  # the row of pixels
    assert np.abs(fade - (ends[0] / 2 + ends[1] / 2)).max() <= 0.5
    assert (cell(picture, 0, 1) == cell(picture, 1, 1)).all()  # the first latent, decoded


def test_neighbours_are_of_the_same_class(model: Path, pictures: Path, tmp_path: Path) -> None:
    picture, found = draw("neighbours", model, pictures, tmp_path, "--count", "2", "--steps", "4")
    assert picture.size == (LABELS + 5 * CELL, 2 * CELL)
    assert [query["image"] for query in found["queries"]] == ["bright/0.png", "dark/0.png"]
    for row, query in enumerate(found["queries"]):
        names = [neighbour["image"] for neighbour in query["neighbours"]]
        assert query["image"] not in names and len(set(names)) == 4
        assert {name[:4] for name in names} == {query["image"][:4]}
        nearest = np.asarray(Image.open(pictures / names[0]))
        assert (cell(picture, row, 1) == nearest).all()


def test_an_attribute_is_tested_on_images_that_did_not_make_it(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, found = draw(
        "attribute",
        model,
        pictures,
        tmp_path,
        "--attribute",
        "bright",
        "--steps",
        "4",
        "--count",
        "1",
    )
    assert (found["images"], found["test_images"]) == ([4, 4], [2, 2])
    assert found["test_accuracy"] == 1 and "100 % of the images" in capsys.readouterr().out
    assert found["strengths"] == [-1, 0, 1, 2] and picture.size == (LABELS + 5 * CELL, CELL)


def test_moving_by_the_direction_changes_the_score(encoded: EncodedImages, tmp_path: Path) -> None:
    """Noise has no attribute: labels that say nothing are guessed."""
    mixed = EncodedImages(
        encoded.model,
        encoded.names,
        encoded.images,
        torch.randn(encoded.latents.shape, generator=torch.Generator().manual_seed(0)),
        ["a", "b"] * 6,
    )
    options = {"attribute": "a", "against": "b", "images": [], "count": 1, "steps": 2}
    assert draw_attribute(mixed, tmp_path / "a.png", **options)["test_accuracy"] <= 0.75


def test_the_first_component_is_the_brightness(model: Path, pictures: Path, tmp_path: Path) -> None:
    picture, found = draw("traverse", model, pictures, tmp_path, "--count", "2", "--steps", "5")
    shares = found["variance_shares"]
    assert found["image"] == "bright/0.png" and shares[0] > 0.5 > shares[1]
    assert picture.size == (LABELS + 5 * CELL, 2 * CELL)
    first, last = cell(picture, 0, 0).astype(float), cell(picture, 0, 4).astype(float)
    other = np.abs(cell(picture, 1, 4).astype(float) - cell(picture, 1, 0)).mean()
    assert np.abs(first - last).mean() > other


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attribute"], "attribute needs --attribute"),
        (["attribute", "--attribute", "brigth"], "no class 'brigth'.*did you mean 'bright'"),
        (["attribute", "--attribute", "dark", "--against", "dark"], "two classes"),
        (["traverse", "--attribute", "dark"], "does not use --attribute"),
        (["traverse", "--images", "dark/1.png", "dark/2.png"], "moves one image"),
        (["neighbours", "--images", "dark/9.png"], "no image 'dark/9.png'"),
        (["interpolate", "--images", "dark/1.png"], "needs two images"),
        (["interpolate", "--steps", "1"], "steps must be at least 2"),
        (["interpolate", "--max_images", "1"], "max_images must be at least 2"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], said: str, model: Path, pictures: Path, tmp_path: Path, capsys
) -> None:
    use, *options = arguments
    with pytest.raises(SystemExit) as error:
        draw(use, model, pictures, tmp_path, *options)
    assert error.value.code == 2
    assert re.search(said, capsys.readouterr().err.replace("\n", " "))


def test_images_without_classes_have_no_attribute(
    kl: Autoencoder, pictures: Path, tmp_path
) -> None:
    flat = encode_images(kl, str(pictures / "bright"), resolution=32, max_images=9)
    assert flat.labels is None
    options = {"against": None, "images": [], "count": 1, "steps": 2}
    with pytest.raises(UserError, match="images in classes"):
        draw_attribute(flat, tmp_path / "a.png", attribute="bright", **options)


def test_a_model_of_one_size_needs_no_resolution(pictures: Path, tmp_path: Path) -> None:
    """A dense VAE of grey images of 8 x 8 pixels, whose latents have no positions."""
    vae("one", height=8, width=8).save_pretrained(tmp_path / "vae")
    arguments = ["latents", str(tmp_path / "vae"), "traverse", "--data", str(pictures)]
    main([*arguments, "--out", str(tmp_path), "--count", "2", "--steps", "5"])
    picture = Image.open(tmp_path / "traverse.png")
    assert picture.mode == "L" and picture.size == (LABELS + 5 * 8 * 10, 2 * 8 * 10)
