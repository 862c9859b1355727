"""Pictures from shards: against plain diffusers, and everything that must be refused before."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import latentvae
from latentvae.autoencoder import Autoencoder
from latentvae.data import EvalTransform, read_image
from latentvae.errors import UserError
from latentvae.latents.decode import decode_folder, picture_names
from latentvae.latents.encode import encode_folder
from latentvae.latents.formats.shards import (
    Manifest,
    read_header,
    sha256_of,
    shard_bytes,
    shard_path,
)
from tests.latents.conftest import contents
from tests.tiny import spread_vq

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tokens(tokenizer: Path, photos: Path, tmp_path: Path) -> Path:
    out = tmp_path / "tokens"
    encode_folder(tokenizer, photos, out, resolution=16, shard_items=5)
    return out


def test_pictures_are_the_reconstructions(
    tokens: Path, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    paths = decode_folder(tokens, tmp_path / "out", batch_size=4)
    names = [item["id"] for item in latentvae.TokenDataset(tokens)]
    assert [path.relative_to(tmp_path / "out").with_suffix("") for path in paths] == [
        Path(name).with_suffix("") for name in names
    ]
    model, transform = latentvae.load(tokenizer), EvalTransform(16)
    for name, path in zip(names, paths, strict=True):
        image = transform(read_image(photos / name))[None]
        recon = model.decode_tokens(model.encode_tokens(image), output_type="pil")
        difference = np.array(recon[0]).astype(int) - np.array(Image.open(path))  # type: ignore[index]
        assert np.abs(difference).max() <= 1  # one picture at a time and four differ in rounding


def test_the_snippet_of_the_docs_gives_the_same_picture(
    tokens: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "tokens.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "VQModel" in c)
    assert "latentvae" not in code and len(code.strip().splitlines()) <= 10
    code = code.replace('"MODEL"', repr(str(tokenizer))).replace("tokens/", f"{tokens}/")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (path,) = decode_folder(tokens, tmp_path / "out", limit=1)
    assert np.array_equal(np.array(Image.open(tmp_path / "first.png")), np.array(Image.open(path)))


def test_the_generator_of_the_docs_draws_each_class(
    tokens: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "own-generator.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    code = code.replace('"runs/tokens/export"', repr(str(tokenizer)))
    monkeypatch.chdir(tokens.parent)
    exec(code.replace("range(10)", "range(1)"), {})
    assert {path.name for path in tmp_path.glob("*.png")} == {"a.png", "b.png"}
    assert Image.open(tmp_path / "a.png").size == (16, 16)


def test_latents_are_decoded_too(kl: Autoencoder, photos: Path, tmp_path: Path) -> None:
    encode_folder(kl, photos, tmp_path / "latents", resolution=(14, 18), dtype="float32")
    (path,) = decode_folder(tmp_path / "latents", tmp_path / "out", model=kl, limit=1)
    image = EvalTransform((14, 18))(read_image(photos / "a" / "00.png"))[None]
    expected = (kl.reconstruct(image)[0].permute(1, 2, 0) + 1) * 127.5
    assert np.abs(expected.numpy() - np.array(Image.open(path))).max() < 1.01


def test_a_killed_decoding_goes_on_and_ranks_share_it(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    decode_folder(tokens, whole, batch_size=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    made = []
    for rank in (2, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        made += decode_folder(tokens, shared, batch_size=2)
    assert len(made) == len(set(made)) == 11
    assert contents(shared) == contents(whole)
    monkeypatch.setenv("WORLD_SIZE", "1")
    lost, kept = shared / "a" / "04.png", shared / "b" / "09.png"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    decode_folder(tokens, shared, batch_size=2)
    assert contents(shared) == contents(whole) and kept.stat().st_mtime_ns == before


def forge(tokens: Path, change: Any) -> None:
    """Change a shard's indices so that every sha256 is right again."""
    path = shard_path(tokens, 1)
    header, tensors = read_header(path), load_file(path)
    assert header is not None
    tensors["indices"] = change(tensors["indices"].int()).to(tensors["indices"].dtype)
    path.write_bytes(shard_bytes(tensors, header))
    manifest = Manifest.model_validate_json((tokens / "manifest.json").read_text())
    manifest.shards[1] = manifest.shards[1].model_copy(update={"sha256": sha256_of(path)})
    (tokens / "manifest.json").write_text(manifest.model_dump_json())


def test_indices_out_of_range_are_refused(tokens: Path, tmp_path: Path) -> None:
    def beyond(indices: torch.Tensor) -> torch.Tensor:
        indices[2, 0, 3] = 300
        return indices

    forge(tokens, beyond)
    name = latentvae.TokenDataset(tokens).reader.name(6)
    said = rf"the tokens of '{name}' must be in 0\.\.299 \(got \d+\.\.300\)"
    with pytest.raises(UserError, match=said):
        decode_folder(tokens, tmp_path / "out", model="no/such/model")  # said before it is sought
    with pytest.raises(UserError, match=said):
        latentvae.TokenDataset(tokens)[6]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x[:, :-1]])
def test_other_shapes_are_refused(change: Any, tokens: Path, tmp_path: Path) -> None:
    forge(tokens, change)
    with pytest.raises(UserError, match="is damaged: it does not hold what the manifest says"):
        decode_folder(tokens, tmp_path / "out")


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00002.parquet"])
def test_a_changed_byte_is_found(name: str, tokens: Path, tmp_path: Path) -> None:
    data = bytearray((tokens / name).read_bytes())
    data[len(data) // 2] ^= 4
    (tokens / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}' does not match .*manifest\.json'"):
        decode_folder(tokens, tmp_path / "out")


def test_another_model_is_refused(tokens: Path, kl: Autoencoder, tmp_path: Path) -> None:
    cases = [
        (Autoencoder(spread_vq(512), name="m"), "with 300 codes, but 'm' has 512 codes"),
        (Autoencoder(spread_vq(seed=1), name="m"), "'m' has other weights than the model"),
        (kl, "with 300 codes, but 'kl' has continuous latents"),
        (str(tmp_path / "nothing"), "no such model folder"),
    ]
    for model, said in cases:
        with pytest.raises(UserError, match=said):
            decode_folder(tokens, tmp_path / "out", model=model)
    path = tokens / "manifest.json"
    manifest = Manifest.model_validate_json(path.read_text())
    moved = manifest.model_copy(update={"model": str(tmp_path / "gone")})
    path.write_text(moved.model_dump_json())
    with pytest.raises(UserError, match=r"no such model folder .*Give another model with --model"):
        decode_folder(tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_of_other_shards_are_not_mixed(
    tokens: Path, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    encode_folder(tokenizer, photos / "a", tmp_path / "a", resolution=16)
    decode_folder(tmp_path / "a", tmp_path / "out")
    with pytest.raises(UserError, match="holds pictures of other shards"):
        decode_folder(tokens, tmp_path / "out")


def test_pictures_that_it_did_not_write_stay(tokens: Path, photos: Path, tmp_path: Path) -> None:
    """The names are those of the sources: a folder of these is a likely slip."""
    for folder, missing in ((tmp_path / "some", True), (tmp_path / "all", False)):
        for name in picture_names([item["id"] for item in latentvae.TokenDataset(tokens)]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"mine")
        if missing:
            (folder / name).unlink()
        with pytest.raises(UserError, match=r"did not write it\. Give another folder"):
            decode_folder(tokens, folder)
        assert {path.read_bytes() for path in folder.rglob("*.*")} == {b"mine"}


def test_folders_that_are_none(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder of shards"):
        decode_folder(tmp_path, tmp_path / "out")
    (tokens / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="is not a manifest that"):
        decode_folder(tokens, tmp_path / "out")
    with pytest.raises(UserError, match="batch_size 0"):
        decode_folder(tokens, tmp_path / "out", batch_size=0)


def test_pictures_stay_in_the_folder_and_apart() -> None:
    given = ["../../etc/x.png", "/abs.jpg", "a.jpg", "a.png", "b\\..\\c.png", "..", "a.jpg.png"]
    names = picture_names(given)
    assert names[:2] == ["etc/x.png", "abs.png"]
    assert len(set(names)) == len(names)
    assert not any(name.startswith("/") or ".." in name.split("/") for name in names)


def test_a_hostile_name_does_not_leave_the_folder(tokens: Path, tmp_path: Path) -> None:
    path = shard_path(tokens, 1)
    header, tensors = read_header(path), load_file(path)
    assert header is not None
    before = bytes(tensors["ids"].tolist())
    tensors["ids"] = torch.tensor(list(before.replace(b"a/08.png", b"../8.png")), dtype=torch.uint8)
    path.write_bytes(shard_bytes(tensors, header))
    forge(tokens, lambda indices: indices)
    decode_folder(tokens, tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / "8.png").exists()
    assert not (tmp_path / "deep" / "8.png").exists()
