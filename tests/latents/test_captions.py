"""Captions beside images are found, go through shards unchanged, and reach a prior."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentvae.cli.main import main
from latentvae.data import DatasetSpec, open_source
from latentvae.engine.loop import train
from latentvae.errors import UserError
from latentvae.latents.captions import find_captions, whole_text
from latentvae.latents.encode import encode_folder
from latentvae.latents.items import SomeItems
from latentvae.latents.shard_dataset import ShardReader, TokenDataset
from latentvae.tasks.prior.task import PriorTask
from tests.tasks.prior.tokens import pictures, small_prior
from tests.tiny import spread_vq

pytestmark = pytest.mark.usefixtures("own_accelerate", "own_caches")
TEXTS = {"ant/00.png": "an ant", "bee/01.png": "eine süße Biene", "bee/03.png": ""}


def caption_of(name: str) -> str:
    return TEXTS.get(name, f"picture {Path(name).stem}")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures, of which eleven have a caption."""
    folder = pictures(tmp_path / "photos")
    for path in folder.rglob("*.png"):
        text = caption_of(path.relative_to(folder).as_posix())
        path.with_suffix(".txt").write_text(f"  {text}\n", encoding="utf-8")
    return folder


def tokens_of(data: Any, out: Path, **options: Any) -> Path:
    if not (out.parent / "tokenizer").exists():
        spread_vq().save_pretrained(out.parent / "tokenizer")
    encode_folder(out.parent / "tokenizer", data, out, resolution=8, shard_items=5, **options)
    return out


def packed(photos: Path, folder: Path) -> Path:
    """Two tar files with the same pictures, and one name in both."""
    folder.mkdir()
    files = sorted(path for path in photos.rglob("*.*") if path.is_file())
    for number in (0, 1):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for path in files:
                name = path.relative_to(photos).as_posix()
                if int(path.stem) % 2 == number or path.stem == "00":
                    tar.add(path, name)
    return folder


def test_halves_of_surrogate_pairs_are_replaced() -> None:
    assert whole_text("a \ud83d b") == "a ? b"
    assert whole_text("ä \U0001f600") == "ä \U0001f600"


def test_a_folder_a_tar_file_and_a_table_have_the_same_captions(
    photos: Path, tmp_path: Path
) -> None:
    source = open_source(photos)
    names = [source.name(i) for i in range(len(source))]
    expected = [caption_of(name) for name in names]
    assert find_captions(source) == expected
    assert find_captions(SomeItems(source, [3, 0], "some")) == [expected[3], expected[0]]

    shards = open_source(packed(photos, tmp_path / "shards"))
    found = find_captions(shards)
    assert found is not None and len(found) == 13
    for i, text in enumerate(found):
        assert text == caption_of(shards.name(i).removeprefix("0.tar/").removeprefix("1.tar/"))

    cells = [{"bytes": (photos / name).read_bytes(), "path": name} for name in names]
    columns = {"image": cells, "caption": [t or None for t in expected], "number": [1] * 12}
    pq.write_table(pa.table(columns), tmp_path / "photos.parquet")
    table = open_source(DatasetSpec(name=str(tmp_path / "photos.parquet")))
    assert find_captions(table) == find_captions(table, caption_column="caption") == expected
    with pytest.raises(UserError, match="column 'number' must hold one text"):
        find_captions(table, caption_column="number")
    with pytest.raises(UserError, match=r"no column 'captoin'.* did you mean 'caption'"):
        find_captions(table, caption_column="captoin")
    with pytest.raises(UserError, match="caption_column 'caption' needs a table"):
        find_captions(source, caption_column="caption")


def test_metadata_of_imagefolder_is_read(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos")
    assert find_captions(open_source(folder)) is None
    file = folder / "metadata.jsonl"
    file.write_text(json.dumps({"file_name": "bee/01.png", "text": "a bee"}) + "\n\n")
    captions = find_captions(open_source(folder))
    assert captions is not None and captions.count("a bee") == 1 and captions.count("") == 11
    file.write_text("[1]\n")
    with pytest.raises(UserError, match=r"metadata.jsonl', line 1: expected a JSON object"):
        find_captions(open_source(folder))


def test_strange_texts_do_no_harm(tmp_path: Path) -> None:
    import os

    folder = pictures(tmp_path / "photos")
    (folder / "ant" / "00.txt").write_bytes(b"\xff ant")
    (folder / "ant" / "02.txt").write_bytes(b"x" * 100_000)
    os.mkfifo(folder / "ant" / "04.txt")
    captions = find_captions(open_source(folder))
    assert captions is not None and captions[0] == "\ufffd ant"
    assert len(captions[1]) == 1 << 16 and captions[2] == ""


def test_captions_go_through_shards(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    tokens = tokens_of(photos, tmp_path / "tokens")
    items, reader = TokenDataset(tokens), ShardReader(tokens)
    assert reader.content.captions and reader.manifest.content == reader.content
    assert reader.captions() == [caption_of(name) for name in reader.names()]
    assert [item["caption"] for item in items] == reader.captions()  # type: ignore[attr-defined]
    rows = datasets.load_dataset(str(tokens), split="train")
    assert rows["caption"][:] == reader.captions()

    arguments = ["encode", str(tmp_path / "tokenizer"), "--data", str(photos)]
    arguments += ["--resolution", "8", "--shard_items", "5"]
    main([*arguments, "--out", str(tmp_path / "again")])
    assert "captions of 11 images" in capsys.readouterr().out
    for path in sorted(tokens.glob("shard-*")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()

    # other captions are other data
    (photos / "ant" / "00.txt").write_text("another text")
    with pytest.raises(UserError, match="another data_sha256"):
        tokens_of(photos, tmp_path / "tokens")
    plain = ShardReader(tokens_of(pictures(tmp_path / "plain"), tmp_path / "without"))
    assert not plain.content.captions and plain.captions() == [""] * 12


def test_a_prior_reads_the_captions_of_its_tokens(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tokens_of(photos, tmp_path / "tokens")
    few = {"max_train_steps": 1, "train_batch_size": 4, "num_sample_images": 1}
    few |= {"tokens": {"tokens": [str(tokens)], "validation_share": 0.3}}

    with pytest.raises(UserError, match=r"1 of 12 images have no caption.* 'bee/03.png'"):
        PriorTask(small_prior(tokens, tmp_path / "run", prior={"condition": "text"}, **few)).open()
    task = PriorTask(small_prior(tokens, tmp_path / "run", **few))  # not all have captions
    task.open()
    assert task.condition == "class"

    (photos / "bee" / "03.txt").write_text("a last bee")
    whole = tokens_of(photos, tmp_path / "whole")
    few["tokens"] = {"tokens": [str(whole)], "validation_share": 0.3}
    train(PriorTask(small_prior(whole, tmp_path / "run", **few)))
    assert "condition      captions" in capsys.readouterr().out

    without = tokens_of(pictures(tmp_path / "plain"), tmp_path / "without")
    few["tokens"] = {"tokens": [str(without)]}
    with pytest.raises(UserError, match="condition text needs captions, but the tokens have none"):
        PriorTask(small_prior(without, tmp_path / "no", prior={"condition": "text"}, **few)).open()
