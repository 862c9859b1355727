"""Shards of several shapes: each image is encoded at the shape nearest to its own."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import latentvae
from latentvae.autoencoder import Autoencoder
from latentvae.cli.main import main
from latentvae.data import EvalTransform, read_image
from latentvae.errors import UserError
from latentvae.latents.decode import decode_folder
from latentvae.latents.encode_buckets import encode_buckets

SHAPES = {"46x22": 2, "32x32": 4, "22x46": 3}  # about 32 x 32 pixels each, in multiples of 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tall, square and wide pictures in two classes, and two files that cannot be read."""
    root = tmp_path_factory.mktemp("pictures")
    sizes = [
        (20, 40),
        (25, 45),
        (30, 30),
        (31, 33),
        (33, 31),
        (40, 41),
        (50, 20),
        (80, 40),
        (60, 30),
    ]
    for number, size in enumerate(sizes):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.radial_gradient("L").convert("RGB").resize(size).save(path)
    (root / "a" / "broken.png").write_bytes(b"")
    (root / "b" / "text.png").write_bytes(b"<html>")
    return root


def test_each_image_is_encoded_at_the_nearest_shape(
    kl: Autoencoder, pictures: Path, tmp_path: Path
) -> None:
    manifests = encode_buckets(
        kl, pictures, tmp_path, resolution=32, aspect_ratio_buckets=3, dtype="float32"
    )
    assert {folder.name: m and m.num_items for folder, m in manifests.items()} == SHAPES
    unreadable = [name for m in manifests.values() if m for name, _ in m.unreadable]
    assert unreadable == ["a/broken.png", "b/text.png"]

    # latents, labels and names against direct encoding
    for folder in manifests:
        height, width = map(int, folder.name.split("x"))
        dataset = latentvae.LatentDataset(folder)
        assert dataset.class_names == ["a", "b"]
        for item in dataset:
            image = EvalTransform((height, width))(read_image(pictures / item["id"]))[None]
            z = kl.encode_posterior(image)[0][0]
            assert item["latent"].shape[1:] == (height // 2, width // 2)
            torch.testing.assert_close(item["latent"], z)
            assert item["label"] == "ab".index(item["id"][0])


def test_the_command_continues_and_refuses_other_shapes(
    tokenizer: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["encode", str(tokenizer), "--data", str(pictures), "--out", str(out)]
    command += ["--resolution", "32", "--aspect_ratio_buckets"]
    main([*command, "3"])
    first = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    assert f"4 images in 1 shards in {out / '32x32'}" in capsys.readouterr().out
    assert sorted(folder.name for folder in out.iterdir()) == sorted(SHAPES)

    # a stopped encoding goes on to the same bytes
    (out / "22x46" / "manifest.json").unlink()
    (out / "22x46" / "shard-00000.safetensors").unlink()
    main([*command, "3"])
    assert {path: path.read_bytes() for path in first} == first

    # other shapes, and a number that means nothing
    for shapes, message in (("2", "holds shards of the shape 32x32"), ("-1", "at least 0 .got -1")):
        with pytest.raises(SystemExit) as ended:
            main([*command, shapes])
        assert ended.value.code == 2
        assert message.split(" .got")[0] in capsys.readouterr().err
    with pytest.raises(UserError, match="holds shards of one shape"):
        encode_buckets(
            tokenizer, pictures, out / "32x32", resolution=(32, 32), aspect_ratio_buckets=3
        )


def test_one_damaged_image_does_not_end_the_encoding(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its header tells a shape that no other image has."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(data / f"{number}.png")
    Image.effect_noise((80, 40), 50).save(data / "wide.png")
    (data / "wide.png").write_bytes((data / "wide.png").read_bytes()[:200])
    shapes = {"resolution": 16, "aspect_ratio_buckets": 3}
    manifests = encode_buckets(tokenizer, data, tmp_path / "out", **shapes)
    assert [(f.name, m and m.num_items) for f, m in manifests.items()] == [("16x16", 3)]
    assert "12x22: none of the 1 images can be read" in capsys.readouterr().out

    # the manifest names the model as it was given
    assert [m and m.model for m in manifests.values()] == [str(tokenizer)]
    assert len(decode_folder(tmp_path / "out" / "16x16", tmp_path / "decoded")) == 3

    # nothing can be read
    for number in range(3):
        (data / f"{number}.png").unlink()
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        encode_buckets(tokenizer, data, tmp_path / "none", **shapes)


def test_large_images_have_their_shape_too(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.new("RGB", (64, 32)).save(tmp_path / "large.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    shapes = {"resolution": 16, "aspect_ratio_buckets": 3}
    manifests = encode_buckets(tokenizer, tmp_path, tmp_path / "out", max_pixels=10**5, **shapes)
    assert sorted(folder.name for folder in manifests) == ["12x22", "16x16"]
