"""Data sets of shards in loaders, in other processes and after pickling; names and headers."""

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from latentvae.errors import UserError
from latentvae.latents import shard_dataset
from latentvae.latents.formats.shards import (
    TOKEN_ORDER,
    Content,
    Manifest,
    ShardFile,
    ShardHeader,
    index_dtype,
    pack_texts,
    read_header,
    sha256_of,
    shard_bytes,
    shard_path,
)
from latentvae.latents.shard_dataset import TokenDataset

COUNTS = (3, 0, 2, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of 2 x 3 x 2 tokens written by hand; item i has the tokens 12 i, 12 i + 1..."""
    content = Content(
        kind="tokens",
        dtype="uint8",
        item_shape=(2, 3, 2),
        order=TOKEN_ORDER,
        num_codes=108,
        model_class="X",
        model_sha256="",
        f=1,
        resolution=2,
        interpolation="lanczos",
        num_source_items=16,
        data_sha256="",
        labels=True,
        shard_items=4,
    )

    # shards
    first, files = 0, []
    for shard, count in enumerate(COUNTS):
        items = torch.arange(12 * first, 12 * (first + count)).reshape(count, 2, 3, 2)
        names = ["é" * number for number in range(first, first + count)]
        tensors = {"indices": items.byte(), "labels": torch.arange(first, first + count)}
        header = ShardHeader(content=content, shard=shard, unreadable=[])
        path = shard_path(tmp_path, shard)
        path.write_bytes(shard_bytes({**tensors, **pack_texts(names, "id")}, header))
        assert read_header(path) == header
        files.append(ShardFile(items=count, sha256=sha256_of(path)))
        first += count

    # manifest
    manifest = Manifest(
        model="m", data="d", num_items=9, content=content, statistics={}, unreadable=[],
        shards=files,
    )  # fmt: skip
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    return tmp_path


def test_items_names_and_labels(folder: Path) -> None:
    dataset = TokenDataset(folder)
    assert len(dataset) == 9
    for index, item in enumerate(dataset):
        assert item["indices"].flatten().tolist() == list(range(12 * index, 12 * index + 12))
        assert item["label"] == index and item["id"] == "é" * index
    assert dataset.reader.names() == ["é" * index for index in range(9)]
    dataset.reader.verify()
    dataset.reader.check()


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_one_process_reads(folder: Path, context: str) -> None:
    dataset = TokenDataset(folder)
    direct = [dataset[index] for index in range(9)]  # which opens shards before workers start
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(
        torch.cat([batch["indices"] for batch in batches]),
        torch.stack([item["indices"] for item in direct]),
    )
    assert [name for batch in batches for name in batch["id"]] == [item["id"] for item in direct]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == list(range(9))


def test_few_shards_are_open_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_dataset, "MAX_OPEN", 2)
    dataset = TokenDataset(folder)
    for index in (0, 8, 4, 0, 5, 2, 8):
        assert dataset[index]["indices"][0, 0, 0] == 12 * index
        assert len(dataset.reader._open) <= 2
    assert copy.deepcopy(dataset).reader._open == {}  # as pickling does


def test_a_missing_shard_is_said_at_once(folder: Path) -> None:
    shard_path(folder, 2).unlink()
    with pytest.raises(UserError, match=r"shard-00002\.safetensors' is missing"):
        TokenDataset(folder)


def test_a_shard_cut_short_has_no_header(folder: Path) -> None:
    path = shard_path(folder, 0)
    data = path.read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        path.write_bytes(data[:length])
        assert read_header(path) is None


@pytest.mark.parametrize(
    ("num_codes", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (2**16 + 1, "int32")],
)
def test_the_largest_index_fits_and_no_smaller_type_holds_it(num_codes: int, dtype: str) -> None:
    assert index_dtype(num_codes) == dtype
    limits = {"uint8": 255, "uint16": 65535, "int32": 2**31 - 1}
    assert num_codes - 1 <= limits[dtype]
    assert all(num_codes - 1 > limit for limit in limits.values() if limit < limits[dtype])


def test_too_many_codes() -> None:
    assert index_dtype(2**31) == "int32"
    with pytest.raises(UserError, match="at most 2147483648 codes"):
        index_dtype(2**31 + 1)
