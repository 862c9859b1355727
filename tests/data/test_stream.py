"""Streams show every image once in a pass, to one rank; bad and held-out ones never."""

import logging
from itertools import islice

import datasets
import pytest
import torch

from latentvae.data import (
    DatasetSpec,
    EvalTransform,
    ImageStream,
    TrainTransform,
    UnreadableImage,
    read_image,
    stream_loader,
)
from latentvae.data.stream import _files
from latentvae.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def table(tmp_path, files, make_parquet):
    """The twelve pictures in four files."""
    cells = [{"bytes": data, "path": name} for name, data in files.items()]
    for number in range(4):
        path = tmp_path / "set" / f"train-{number:05d}-of-00004.parquet"
        make_parquet(path, cells[number::4])
    return tmp_path / "set"


def stream(path, **options):
    return ImageStream(DatasetSpec(name=str(path)), **({"shuffle_buffer": 5} | options))


def batches(source, count, *, batch_size=3, seed=1, **options):
    # Whole and in the middle, so that an image can be told from the tensor.
    loader = stream_loader(
        source, TrainTransform(16, crop="center"), batch_size=batch_size, seed=seed, **options
    )
    return list(islice(loader, count))


@pytest.fixture
def name_of(files):
    """The name of the picture that a tensor shows."""
    transform = EvalTransform(16)
    shown = {name: transform(read_image(data)) for name, data in files.items()}

    def find(image):
        return min(shown, key=lambda name: (shown[name] - image).abs().sum().item())

    return find


def names(found, name_of):
    return [name_of(image) for batch in found for image in batch.on("cpu")]


def test_a_pass_shows_each_image_once_in_an_order_of_its_own(table, files, name_of):
    shown = names(batches(stream(table), 8), name_of)
    assert sorted(shown[:12]) == sorted(shown[12:]) == sorted(files)
    assert shown[:12] != shown[12:] and shown[:12] != list(files)
    assert shown == names(batches(stream(table), 8), name_of)
    assert shown != names(batches(stream(table), 8, seed=2), name_of)
    indices = torch.cat([batch.indices for batch in batches(stream(table), 8)])
    assert indices.tolist() == list(range(24))


@pytest.mark.parametrize("world_size", [2, 3])  # of four files: shared out by file, and by row
def test_ranks_share_a_pass(table, files, name_of, world_size):
    count = 12 // world_size
    parts = [
        batches(stream(table), count, batch_size=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(name for part in parts for name in names(part, name_of)) == sorted(files)
    assert len({int(batch.indices) for part in parts for batch in part}) == 12


def test_workers_share_a_pass_and_are_no_more_than_the_files(table, files, name_of):
    found = batches(stream(table), 4, num_workers=2)
    assert sorted(names(found, name_of)) == sorted(files)
    assert len({index for batch in found for index in batch.indices.tolist()}) == 12
    one = stream(sorted(table.iterdir())[0])
    loader = stream_loader(one, TrainTransform(16), batch_size=2, seed=0, num_workers=3)
    assert loader.num_workers == 1


def test_several_crops_of_each_row(table, files, name_of):
    found = batches(stream(table), 4, crops=2)
    assert all(len(batch.images) == 6 for batch in found)
    shown = names(found, name_of)
    assert shown[::2] == shown[1::2] and sorted(shown[::2]) == sorted(files)
    resumed = batches(stream(table), 2, crops=2, start_step=2)
    assert torch.equal(resumed[0].images, found[2].images)


@pytest.mark.parametrize("start_step", [1, 3, 4, 6])
def test_a_resumed_stream_passes_over_what_it_showed_and_says_so(table, caplog, start_step):
    unbroken = batches(stream(table), 8)
    with caplog.at_level(logging.WARNING):
        resumed = batches(stream(table), 8 - start_step, start_step=start_step)
    for a, b in zip(resumed, unbroken[start_step:], strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices)
    assert len(caplog.records) == 1
    assert f"resumes only approximately: each rank skips {3 * start_step} images" in caplog.text


def test_bad_images_are_left_out_and_reported(tmp_path, files, make_parquet):
    cells = [{"bytes": data, "path": name} for name, data in list(files.items())[:6]]
    cells += [{"bytes": b"<html>", "path": "bad.png"}, None]
    found = batches(stream(make_parquet(tmp_path / "x.parquet", cells)), 6, batch_size=2)
    bad = [entry for batch in found for entry in batch.bad]
    assert ("bad.png", "not an image of a known format") in bad
    assert next(reason for name, reason in bad if name != "bad.png") == "the row has no image"
    path = make_parquet(tmp_path / "bad.parquet", cells[6:] * 20)
    with pytest.raises(UnreadableImage, match="cannot read image"):
        batches(stream(path), 1)


def test_held_out_images_are_validated_on_and_never_trained_on(table, files, name_of):
    source = stream(table, held_out=4)
    held = [source.held_out.name(index) for index in range(len(source.held_out))]
    assert len(held) == 4
    for index, name in enumerate(held):
        assert source.held_out.read(index).tobytes() == read_image(files[name]).tobytes()
    shown = names(batches(source, 8, batch_size=2), name_of)
    assert sorted(shown[:8]) == sorted(shown[8:]) == sorted(set(files) - set(held))


def test_a_stream_of_image_files(photos, files, name_of, monkeypatch):
    remote = datasets.load_dataset("imagefolder", data_dir=str(photos), streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: remote)
    assert sorted(names(batches(stream("user/photos"), 4), name_of)) == sorted(files)


def test_a_stream_of_which_nothing_is_left_ends_in_one_sentence(table):
    with pytest.raises(UserError, match=r"gets no training images from '.*set'"):
        batches(stream(table, held_out=12), 1)


def test_the_column_is_found_or_refused(tmp_path, table, files, make_parquet):
    assert stream(table).column == "image"
    with pytest.raises(UserError, match=r"no column 'imgae', .*did you mean 'image'"):
        ImageStream(DatasetSpec(name=str(table), image_column="imgae"))


def test_a_row_that_cannot_be_held_out_is_named(caplog):
    assert list(_files([{"bytes": None, "path": None}], split="train")) == []
    assert "Validation leaves out" in caplog.text and "train/000000000" in caplog.text
