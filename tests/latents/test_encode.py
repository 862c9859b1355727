"""Shards: the same bytes however they came about, and what is in them, against direct encoding."""

import copy
import json
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor

import latentvae
from latentvae.autoencoder import Autoencoder
from latentvae.coding.token_codec import encode_tokens
from latentvae.data import EvalTransform, ImageFolder, read_image
from latentvae.errors import UserError
from latentvae.latents.decode import decode_folder
from latentvae.latents.encode import encode_folder
from latentvae.latents.formats.shards import shard_path
from latentvae.latents.shard_dataset import ShardReader
from latentvae.metrics.tokens import TokenUsage
from tests.icc import ADOBE_RGB
from tests.latents.conftest import contents
from tests.tiny import spread_vq

OPTIONS: dict[str, Any] = {"resolution": 16, "batch_size": 2, "shard_items": 3}
NAMES = [f"a/{n:02d}.png" for n in (0, 2, 4, 6, 8, 10)] + [
    f"b/{n:02d}.png" for n in (1, 3, 5, 7, 9)
]


class Kill(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.fixture(scope="module")
def unbroken(tokenizer: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert encode_folder(tokenizer, photos, out, **OPTIONS) is not None
    return out


def test_tokens_labels_and_names_are_those_of_direct_encoding(
    unbroken: Path, tokenizer: Path, photos: Path
) -> None:
    model, transform = latentvae.load(tokenizer), EvalTransform(16)
    dataset = latentvae.TokenDataset(unbroken)
    assert [item["id"] for item in dataset] == NAMES
    assert dataset.class_names == ["a", "b"] and dataset.num_codes == 300
    for index, name in enumerate(NAMES):
        item = dataset[index]
        expected = model.encode_tokens(transform(read_image(photos / name))[None])[0]
        assert torch.equal(item["indices"], expected) and item["indices"].dtype == torch.int64
        assert item["label"] == "ab".index(name[0])
        with Image.open(photos / name) as picture:
            assert dataset.reader.read("sizes", index).tolist() == [picture.height, picture.width]
    assert torch.equal(dataset[-1]["indices"], dataset[10]["indices"])
    with pytest.raises(IndexError):
        dataset[11]


def test_the_manifest(unbroken: Path) -> None:
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert [shard["items"] for shard in manifest["shards"]] == [3, 2, 3, 3, 0]
    assert manifest["unreadable"] == [
        ["a/05.jpg", "not an image of a known format"],
        ["b/zz.jpg", "the file is empty"],
    ]
    assert manifest["num_items"] == 11
    assert manifest["content"]["dtype"] == "uint16"
    assert manifest["content"]["item_shape"] == [8, 8]
    tokens = [item["indices"] for item in latentvae.TokenDataset(unbroken)]
    usage = TokenUsage(300)
    usage.update(torch.stack(tokens))
    report, facts = usage.result(), manifest["statistics"]
    assert facts["num_codes_used"] == report["num_codes_used"] > 10
    assert facts["perplexity"] == pytest.approx(report["perplexity"])
    bits = [8 * len(encode_tokens(t.numpy(), num_codes=300)) for t in tokens]
    assert facts["coded_bpp"] == pytest.approx(np.mean(bits) / 16**2)
    assert facts["raw_bpp"] == pytest.approx(64 * np.log2(300) / 16**2)


@pytest.mark.parametrize("step", ["replace", "fsync", "half"])
def test_a_kill_at_any_write_loses_and_doubles_nothing(
    step: str, tokenizer: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the k-th rename, before the k-th sync or in the middle of the k-th file."""
    model, options = latentvae.load(tokenizer), {**OPTIONS, "shard_items": 5}
    encode_folder(model, photos / "a", tmp_path / "unbroken", **options)
    expected = contents(tmp_path / "unbroken")
    function = "replace" if step == "replace" else "fsync"
    original = getattr(os, function)
    calls = deadly = kills = 0

    def killing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == deadly:
            if step == "half" and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            raise Kill
        original(*arguments)

    monkeypatch.setattr(os, function, killing)
    for kill in range(1, 100):
        out, calls, deadly = tmp_path / str(kill), 0, kill
        try:
            encode_folder(model, photos / "a", out, **options)
            break
        except Kill:
            kills += 1
        deadly = 0
        encode_folder(model, photos / "a", out, **options)
        assert contents(out) == expected
    # Two shards of a parquet and a safetensors file; then README.md and manifest.json. Each is
    # synced and renamed, and its folder synced.
    assert kills == (2 * 2 + 2) * (1 if step == "replace" else 2)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_any_number_of_ranks_writes_the_same(
    world_size: int,
    unbroken: Path,
    tokenizer: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    ended = []
    for rank in reversed(range(world_size)):
        monkeypatch.setenv("RANK", str(rank))
        ended.append(encode_folder(tokenizer, photos, tmp_path, **OPTIONS))
    assert [manifest is None for manifest in ended] == [True] * (world_size - 1) + [False]
    assert contents(tmp_path) == contents(unbroken)


def test_ranks_may_be_others_after_a_kill(
    unbroken: Path,
    tokenizer: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    encode_folder(tokenizer, photos, tmp_path, **OPTIONS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # shards 1 and 4
    (tmp_path / "manifest.json.part-2").write_text("{")
    (tmp_path / "shard-00000.safetensors.part-0").write_text("")
    with pytest.raises(UserError, match=r"has 2 shards but no manifest\.json: its encoding is not"):
        latentvae.TokenDataset(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    encode_folder(tokenizer, photos, tmp_path, **OPTIONS)
    assert contents(tmp_path) == contents(unbroken)


def test_workers_change_nothing(
    unbroken: Path, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    encode_folder(tokenizer, photos, tmp_path, num_workers=2, **OPTIONS)
    assert contents(tmp_path) == contents(unbroken)


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "shard-00001.parquet"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_the_same_command_mends_a_damaged_shard(
    name: str, damage: str, unbroken: Path, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    for file, data in contents(unbroken).items():
        (tmp_path / file).write_bytes(data)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data[: -9 if damage == "cut" else None])
    if damage == "gone":
        (tmp_path / name).unlink()
    encode_folder(tokenizer, photos, tmp_path, **OPTIONS)
    assert contents(tmp_path) == contents(unbroken)


def test_the_same_images_in_a_tar_file_give_the_same_shards(
    unbroken: Path, tokenizer: Path, photos: Path, tmp_path: Path, own_caches: Path
) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for path in sorted(photos.rglob("*.*"), reverse=True):
            tar.add(path, arcname=path.relative_to(photos).as_posix())
    encode_folder(tokenizer, tmp_path / "photos.tar", tmp_path / "out", **OPTIONS)
    ours, expected = contents(tmp_path / "out"), contents(unbroken)
    del ours["manifest.json"], expected["manifest.json"]  # which says where the data was
    assert ours == expected


def test_an_encoded_folder_is_not_encoded_again(
    unbroken: Path, tokenizer: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    encode_folder(tokenizer, photos, unbroken, **OPTIONS)
    assert before == {path: path.stat().st_mtime_ns for path in unbroken.iterdir()}


def test_other_shards_are_refused_or_replaced(
    unbroken: Path, tokenizer: Path, photos: Path, tmp_path: Path
) -> None:
    other = Autoencoder(spread_vq(seed=1), name="other")
    encode_folder(other, photos, tmp_path, **{**OPTIONS, "shard_items": 1})
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=r"with another model_sha256, shard_items\. Give another fol"
    ):
        encode_folder(tokenizer, photos, tmp_path, **OPTIONS)
    assert contents(tmp_path) == before
    encode_folder(tokenizer, photos, tmp_path, overwrite=True, **OPTIONS)
    assert contents(tmp_path) == contents(unbroken)


def test_what_overwriting_does_not_see_is_told(
    tokenizer: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for overwrite in (False, True, True):
        before = contents(tmp_path)
        encode_folder(tokenizer, photos, tmp_path, overwrite=overwrite, **OPTIONS)
        told = "Delete the folder if the images have changed" in capsys.readouterr().out
        assert told == bool(before and overwrite)
    assert contents(tmp_path) == before
    (tmp_path / "manifest.json").unlink()  # a killed one has none
    encode_folder(tokenizer, photos, tmp_path, overwrite=True, **OPTIONS)
    assert "Delete the folder if the images have changed" in capsys.readouterr().out


def test_files_of_others_are_not_touched(tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "shard-00000.safetensors"
    save_file({"weight": np.ones(2)}, foreign)
    before = foreign.read_bytes()
    with pytest.raises(UserError, match="damaged or not a shard of latentvae"):
        encode_folder(tokenizer, photos, tmp_path, **OPTIONS)
    assert contents(tmp_path) == {foreign.name: before}


def test_latents_that_overflow_are_refused(kl: Autoencoder, photos: Path, tmp_path: Path) -> None:
    net = copy.deepcopy(kl.net)
    with torch.no_grad():
        net.quant_conv.bias[0] = 1e5
    model = Autoencoder(net, name="large")
    with pytest.raises(UserError, match=r"'large' are not finite in float16\. Use dtype float32"):
        encode_folder(model, photos, tmp_path / "16", **OPTIONS)
    encode_folder(model, photos, tmp_path / "32", dtype="float32", **OPTIONS)
    assert latentvae.LatentDataset(tmp_path / "32")[0]["latent"].amax() > 65504


class Given(Autoencoder):
    """Tokens that are given: 0 and K - 1 in each image; of `levels` levels, if any."""

    def __init__(self, num_codes: int, levels: int | None = None) -> None:
        super().__init__(spread_vq(), name="given")
        self.num_codes, self.levels = num_codes, levels

    def encode_tokens(self, images: Any) -> Tensor:
        shape = (len(images), *([self.levels] if self.levels else []), 2, 3)
        indices = (torch.arange(int(np.prod(shape))) % self.num_codes).reshape(shape)
        indices[..., 0, 0], indices[..., 1, 2] = self.num_codes - 1, 0
        return indices


@pytest.mark.parametrize(
    ("num_codes", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")],
)
@pytest.mark.parametrize("levels", [None, 4])
def test_the_smallest_sufficient_type(
    num_codes: int, dtype: str, levels: int | None, photos: Path, tmp_path: Path, own_caches: Path
) -> None:
    model = Given(num_codes, levels)
    manifest = encode_folder(model, photos, tmp_path, resolution=16, batch_size=11)
    assert manifest is not None and manifest.content.dtype == dtype
    stored = load_file(shard_path(tmp_path, 0))["indices"]
    expected = model.encode_tokens(range(11))
    # The last batch of 13 items is short: two are unreadable, so items 0 to 9 are one batch.
    assert stored.dtype == np.dtype(dtype) and stored.shape == expected.shape
    assert np.array_equal(stored[:10], expected[:10].numpy())
    dataset = latentvae.TokenDataset(tmp_path)
    assert torch.equal(dataset[9]["indices"], expected[9])
    assert dataset[9]["indices"].max() == num_codes - 1
    if num_codes in (257, 65537):
        table = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(own_caches))
        assert isinstance(table, datasets.Dataset)
        rows = table.with_format("torch")[:]
        assert torch.equal(torch.as_tensor(rows["indices"]).long(), torch.tensor(stored).long())


def test_load_dataset_gives_what_token_dataset_gives(unbroken: Path, own_caches: Path) -> None:
    tokens = latentvae.TokenDataset(unbroken)
    table = datasets.load_dataset(str(unbroken), split="train", cache_dir=str(own_caches))
    streamed = datasets.load_dataset(str(unbroken), split="train", streaming=True)
    assert len(table) == len(tokens) == 11
    for row, streamed_row, item in zip(table, streamed, tokens, strict=True):
        assert row == streamed_row
        assert row["id"] == item["id"] and row["label"] == item["label"]
        assert row["indices"] == item["indices"].tolist()


def test_names_that_are_not_utf8(tokenizer: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in (b"\xff.png", "ä.png".encode()):
        Image.new("RGB", (16, 16)).save(
            os.path.join(os.fsencode(data), name).decode(errors="surrogateescape")
        )
    (data / os.fsdecode(b"\xfe.png")).write_bytes(b"")
    encode_folder(tokenizer, data, out, resolution=16)
    assert [item["id"] for item in latentvae.TokenDataset(out)] == [
        name for name in ImageFolder(data).names if name != os.fsdecode(b"\xfe.png")
    ]


def test_labels_of_a_table(tokenizer: Path, photos: Path, tmp_path: Path, own_caches: Path) -> None:
    files = [photos / name for name in NAMES]
    labels = [n % 3 for n in range(len(files))]

    # a table with two kinds of labels
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["x", "y", "z"]),
            "number": datasets.Value("int16"),
            "text": datasets.Value("string"),
        }
    )
    rows = {
        "image": [{"bytes": f.read_bytes(), "path": f"{99 - i}.png"} for i, f in enumerate(files)],
        "label": labels,
        "number": [None, *range(1, len(files))],
        "text": [""] * len(files),
    }
    table = tmp_path / "table.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(table))

    # the default label column
    encode_folder(tokenizer, table, tmp_path / "out", resolution=16)
    dataset = latentvae.TokenDataset(tmp_path / "out")
    assert dataset.class_names == ["x", "y", "z"]
    assert [item["label"] for item in dataset] == labels[::-1]  # sorted by the stored path

    # a chosen label column
    encode_folder(tokenizer, table, tmp_path / "n", resolution=16, label_column="number")
    numbers = [item["label"] for item in latentvae.TokenDataset(tmp_path / "n")]
    assert numbers == [*reversed(range(1, len(files))), -1]

    # wrong label columns
    wrong = (("nubmer", "did you mean 'number'"), ("text", "must hold integers or classes"))
    for column, said in wrong:
        with pytest.raises(UserError, match=said):
            encode_folder(tokenizer, table, tmp_path / "no", resolution=16, label_column=column)


def test_latents_and_their_moments(kl: Autoencoder, photos: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "dtype": "float32", "moments": True}
    manifest = encode_folder(kl, photos, tmp_path, **options)
    assert manifest is not None
    images = torch.stack([EvalTransform(16)(read_image(photos / name)) for name in NAMES])
    mean, logvar = kl.encode_posterior(images)
    assert logvar is not None
    raw, scaled = latentvae.LatentDataset(tmp_path), latentvae.LatentDataset(tmp_path, scaled=True)
    stored = torch.stack([item["latent"] for item in raw])
    torch.testing.assert_close(stored, mean, rtol=1e-4, atol=1e-5)
    normed = torch.stack([item["latent"] for item in scaled])
    torch.testing.assert_close(normed, (stored - 0.25) * 0.5)
    assert manifest.statistics["std"] == pytest.approx(stored.double().std().item())
    assert manifest.statistics["mean"] == pytest.approx(stored.double().mean().item())
    torch.manual_seed(3)
    noise = torch.randn(mean.shape[1:])
    torch.manual_seed(3)
    drawn = latentvae.LatentDataset(tmp_path, sample=True)[4]["latent"]
    torch.testing.assert_close(drawn, stored[4] + (logvar[4] / 2).exp() * noise)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_rounded_once(
    dtype: Any, kl: Autoencoder, photos: Path, tmp_path: Path
) -> None:
    encode_folder(kl, photos, tmp_path / "32", dtype="float32", **OPTIONS)
    encode_folder(kl, photos, tmp_path / "16", dtype=dtype, **OPTIONS)
    exact, rounded = (latentvae.LatentDataset(tmp_path / name) for name in ("32", "16"))
    for a, b in zip(exact, rounded, strict=True):
        assert torch.equal(a["latent"].to(getattr(torch, dtype)).float(), b["latent"])
        assert b["latent"].dtype == torch.float32
    with pytest.raises(UserError, match="holds no standard deviations, but `sample` needs"):
        latentvae.LatentDataset(tmp_path / "32", sample=True)
    with pytest.raises(UserError, match=r"holds latents, not tokens\. Read it with LatentDataset"):
        latentvae.TokenDataset(tmp_path / "32")


def test_wrong_options_are_refused_before_a_file_is_written(
    tokenizer: Path, kl: Autoencoder, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tokenizer, {"resolution": 1}, "resolution must be at least 2, the pixels of one"),
        (tokenizer, {"resolution": 0}, "resolution must be at least 2, .*got 0"),
        (
            kl,
            {"resolution": 63},
            r"63 is not a multiple of 2, .* The nearest multiples are 62 and 64",
        ),
        (tokenizer, {"resolution": (16, 21)}, "21 is not a multiple of 2, .* 20 and 22"),
        (kl, {"resolution": (16, 16, 16)}, "one number, or height and width"),
        (tokenizer, {"dtype": "float16"}, "is a tokenizer"),
        (tokenizer, {"batch_size": 0}, "batch_size 0"),
        (tokenizer, {"shard_items": 0}, "shard_items must be at least 1 .*got 0"),
        (tokenizer, {"label_column": "label"}, "needs a table, but the data is not"),
        (tokenizer, {"interpolation": "bicubc"}, "did you mean 'bicubic'"),
        (kl, {"dtype": "float61"}, "did you mean 'float16'"),
    ]

    # wrong options
    for model, options, said in cases:
        with pytest.raises(UserError, match=said):
            encode_folder(model, photos, out, **{**OPTIONS, **options})

    # a wrong data folder
    with pytest.raises(UserError, match="did you mean"):
        encode_folder(tokenizer, photos.parent / f"{photos.name}x", out, **OPTIONS)
    assert not out.exists()

    # an output path that is a file
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        encode_folder(tokenizer, photos, tmp_path / "file", **OPTIONS)


def test_what_computed_is_recorded_and_not_mixed(
    kl: Autoencoder, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kl.net.save_pretrained(tmp_path / "kl")
    options: dict[str, Any] = {"resolution": 16, "dtype": "float32"}
    out = tmp_path / "out"
    manifest = encode_folder(tmp_path / "kl", photos, out, optimize="exact", **options)
    assert manifest is not None and manifest.content.optimize == "exact"
    assert capsys.readouterr().out == "kl: exact\n"
    with pytest.raises(UserError, match="shards with another optimize"):
        encode_folder(tmp_path / "kl", photos, out, **options)
    plain = encode_folder(tmp_path / "kl", photos, tmp_path / "plain", **options)
    assert plain is not None and plain.content.optimize is None
    ours, theirs = (load_file(shard_path(f, 0))["latents"] for f in (out, tmp_path / "plain"))
    assert np.abs(ours - theirs).max() < 1e-5
    decode_folder(out, tmp_path / "pictures", optimize="exact", limit=1)
    with pytest.raises(UserError, match=r"decoded with optimize exact .*now None"):
        decode_folder(out, tmp_path / "pictures", limit=1)


def test_not_one_readable_image(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 images can be read, for example 'a\.png'"):
        encode_folder(tokenizer, tmp_path / "data", tmp_path / "out", resolution=16)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_colour_profiles_become_srgb_unless_they_are_ignored(
    tokenizer: Path, tmp_path: Path
) -> None:
    """An image with a profile has the tokens of the same image in sRGB."""
    found = {}
    for name, colour, options in (
        ("srgb", (0, 181, 42), {}),
        ("adobe", (60, 180, 60), {"icc_profile": ADOBE_RGB}),
        ("raw", (60, 180, 60), {}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        Image.new("RGB", (16, 16), colour).save(folder / "a.png", **options)
        for ignored in (False, True):
            out = tmp_path / f"{name}-{ignored}"
            encode_folder(tokenizer, folder, out, **OPTIONS, ignore_icc=ignored)
            manifest = json.loads((out / "manifest.json").read_text())
            assert manifest["content"]["ignore_icc"] is ignored
            found[name, ignored] = latentvae.TokenDataset(out)[0]["indices"]
    assert torch.equal(found["adobe", False], found["srgb", False])
    assert torch.equal(found["adobe", True], found["raw", True])
    assert not torch.equal(found["srgb", False], found["raw", True])


def test_flipped_images_have_the_tokens_of_mirrored_files(tokenizer: Path, tmp_path: Path) -> None:
    for index in range(4):  # of the size that is encoded, so nothing is resized
        noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        for name, pixels in (("plain", noise), ("mirrored", noise[:, ::-1])):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / name / f"{index}.png")
    encode_folder(tokenizer, tmp_path / "mirrored", tmp_path / "a", resolution=16)
    encode_folder(tokenizer, tmp_path / "plain", tmp_path / "b", resolution=16, flip=True)
    files, flips = (ShardReader(tmp_path / name).whole("indices") for name in "ab")
    assert torch.equal(files, flips)
    assert ShardReader(tmp_path / "b").content.flip
