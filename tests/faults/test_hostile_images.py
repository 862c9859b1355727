"""Hostile and odd files in every form: each bad one is one line with its name and the reason, all
others are read, and nothing waits."""

import io
import logging
import os
import re
import tarfile
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
import torch

from latentvae.data import (
    BadImages,
    DatasetSpec,
    EvalTransform,
    HubImages,
    ImageFolder,
    IndexSampler,
    TarShards,
    TrainImages,
    TrainTransform,
    UnreadableImage,
    open_images,
    open_source,
    train_loader,
    validation_batches,
)
from latentvae.data.tar import MAX_BYTES
from latentvae.errors import UserError
from tests.data.conftest import parquet, tar
from tests.faults.hostile import LEFT_OUT, bad_files, fill, odd_entries, odd_files

pytestmark = pytest.mark.usefixtures("own_caches")
FORMS = ("folder", "tar", "table")


@pytest.fixture(scope="module")
def bad():
    return bad_files()


@pytest.fixture(scope="module")
def odd():
    return odd_files()


@pytest.fixture
def store(tmp_path):
    """Opens files in one of the forms."""

    def stored(form, files):
        if form == "folder":
            return ImageFolder(fill(tmp_path / "folder", files))
        if form == "tar":
            return TarShards(tar(tmp_path / "x.tar", files))
        files = {name.encode(errors="replace").decode(): data for name, data in files.items()}
        cells = [{"bytes": data, "path": name} for name, data in files.items()]
        return HubImages(DatasetSpec(name=str(parquet(tmp_path / "x.parquet", cells))))

    return stored


def told(source):
    """Names and lines of what cannot be read; everything else is read and fits a batch."""
    lines = {}
    for index in range(len(source)):
        try:
            tensor = EvalTransform(8)(source.read(index))
            assert tensor.shape == (3, 8, 8) and tensor.isfinite().all()
        except UnreadableImage as error:
            line = str(error)
            assert line.isprintable() and line.encode() and error.reason, source.name(index)
            lines[source.name(index)] = line
    return lines


@pytest.mark.parametrize("form", FORMS)
def test_each_bad_file_is_one_line_and_the_others_are_read(form, store, bad, odd):
    source = store(form, {name: data for name, (data, _) in bad.items()} | odd)
    assert len(source) == len(bad) + len(odd)
    lines = told(source)
    expected = {name: reason for name, (_, reason) in bad.items()}
    if form == "table":
        expected = {n.encode(errors="replace").decode(): reason for n, reason in expected.items()}
    assert lines.keys() == expected.keys()
    for name, reason in expected.items():
        stem = name.split(".")[0].split("\n")[0].replace("\udcff", r"\udcff")
        assert stem in lines[name] and re.search(reason, lines[name].partition("': ")[2]), name


@pytest.mark.parametrize("form", FORMS)
def test_two_workers_name_each_bad_file_and_put_others_in_its_place(form, store, bad, odd):
    source = store(form, {name: data for name, (data, _) in bad.items()} | odd)
    sampler = IndexSampler(len(source), 4, seed=0)
    dataset = TrainImages(source, TrainTransform(8), seed=0)
    loader = train_loader(dataset, sampler, num_workers=2)
    found, batches = BadImages(), list(islice(loader, 2 * sampler.steps_per_epoch))
    named = [name for batch in batches for name, _ in found.update(batch.bad)]
    assert len(named) == len(set(named)) == len(bad)
    assert all(batch.images.shape == (4, 3, 8, 8) for batch in batches)


def test_validation_counts_what_it_leaves_out(store, bad, odd):
    source, found = store("tar", {name: data for name, (data, _) in bad.items()} | odd), BadImages()
    seen = [
        name
        for rank in range(2)
        for _, names in validation_batches(
            source, EvalTransform(8), batch_size=5, rank=rank, world_size=2, bad=found
        )
        for name in names
    ]
    assert sorted(seen) == sorted(odd) and found.reasons.keys() == bad.keys()


def test_where_nothing_can_be_read_a_worker_says_so_in_one_line(store):
    dataset = TrainImages(store("folder", {"a.png": b"", "b.png": b"x"}), TrainTransform(8), seed=0)
    loader = train_loader(dataset, IndexSampler(2, 1, seed=0), num_workers=2)
    batches = iter(loader)
    with pytest.raises(UnreadableImage) as error:
        next(batches)
    batches._shutdown_workers()  # the error holds it, and the collector would be slow about it
    assert re.fullmatch(r"cannot read image '[ab]\.png': .*19 other images.*", str(error.value))


def test_hidden_and_other_files_are_left_out(store, odd):
    junk = dict.fromkeys(LEFT_OUT, b"junk")
    for form in ("folder", "tar"):
        assert store(form, odd | junk).names == sorted(odd)


def test_pipes_dead_links_and_loops_in_a_folder(tmp_path, odd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "folder", odd)
    expected = odd_entries(tmp_path / "folder")
    source = open_source(tmp_path / "folder")
    assert len(source) == len(odd) + len(expected)  # nothing twice by way of the loop
    lines = told(source)
    assert lines.keys() == expected.keys()
    assert all(reason in lines[name] for name, reason in expected.items())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path, odd):
    source = ImageFolder(fill(tmp_path / "folder", odd))
    (tmp_path / "folder" / "UPPER.JPG").chmod(0)
    assert "Permission denied" in told(source)["UPPER.JPG"]


def test_a_file_that_vanishes_or_becomes_a_pipe_under_the_run(tmp_path, odd):
    source = ImageFolder(fill(tmp_path / "folder", odd))
    (tmp_path / "folder" / "UPPER.JPG").unlink()
    (tmp_path / "folder" / "deep.png").unlink()
    os.mkfifo(tmp_path / "folder" / "deep.png")
    lines = told(source)
    assert lines.keys() == {"UPPER.JPG", "deep.png"} and "regular file" in lines["deep.png"]


def test_members_of_tars_that_are_no_images(tmp_path, odd):
    """Links, devices, pipes, paths out of the shard, and a member that promises a terabyte."""
    path = tar(tmp_path / "s" / "0.tar", {f"../../{name}": data for name, data in odd.items()})
    with tarfile.open(path, "a") as writer:
        kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
        for kind in [*kinds, tarfile.FIFOTYPE, tarfile.DIRTYPE]:
            member = tarfile.TarInfo(f"kind-{kind.decode()}.png")
            member.type, member.linkname = kind, "/dev/zero"
            writer.addfile(member)
    assert TarShards(path).names == sorted(odd) and not told(TarShards(path))
    huge = tarfile.TarInfo("huge.png")
    huge.size = MAX_BYTES + 512
    with open(tmp_path / "s" / "1.tar", "wb") as file:  # sparse: no such space is taken
        file.write(huge.tobuf())
        file.truncate(512 + huge.size + 1024)
    assert list(told(TarShards(tmp_path / "s"))) == ["huge.png"]


def test_shards_that_are_no_files(tmp_path, odd, caplog):
    tar(tmp_path / "s" / "0.tar", odd)
    (tmp_path / "s" / "folder.tar").mkdir()
    (tmp_path / "s" / "loop").symlink_to(".")
    (tmp_path / "s" / "._0.tar").write_bytes(b"junk")
    assert len(TarShards(tmp_path / "s")) == len(odd)
    os.mkfifo(tmp_path / "s" / "pipe.tar")
    for spec in (tmp_path / "s", tmp_path / "s" / "pipe.tar"):
        with pytest.raises(UserError, match=r"pipe\.tar' is not a regular file"):
            TarShards(spec)
    (tmp_path / "s" / "pipe.tar").unlink()
    (tmp_path / "s" / "gone.tar").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot read '.*gone\.tar': No such file"):
        TarShards(tmp_path / "s")
    (tmp_path / "s" / "gone.tar").unlink()
    content = (tmp_path / "s" / "0.tar").read_bytes()
    (tmp_path / "s" / "cut\n\udcff.tar").write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        TarShards(tmp_path / "s")
    (record,) = caplog.records
    assert record.getMessage().isprintable() and r"cut\n\udcff.tar' is damaged" in caplog.text


CELLS = {
    "null": (None, "no image"),
    "both null": ({"bytes": None, "path": None}, "no image"),
    "no bytes": ({"bytes": b"", "path": None}, "the file is empty"),
    "html": ({"bytes": b"<html>", "path": "x.png"}, "not an image"),
    "missing path": ({"bytes": None, "path": "/nowhere/x.png"}, "No such file|nowhere"),
    "path of a folder": ({"bytes": None, "path": "/"}, "regular file"),
    "path of a device": ({"bytes": None, "path": "/dev/zero"}, "regular file"),
    "path of no scheme": ({"bytes": None, "path": "nothing://x"}, "."),
}


@pytest.mark.parametrize("kind", CELLS)
def test_cells_of_tables(tmp_path, odd, kind):
    cell, reason = CELLS[kind]
    good = {"bytes": odd["deep.png"], "path": "good.png"}
    source = HubImages(DatasetSpec(name=str(parquet(tmp_path / "x.parquet", [good, cell]))))
    (line,) = told(source).values()
    assert re.search(reason, line.partition("': ")[2])


def test_a_cell_with_the_path_of_a_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    cells = [{"bytes": None, "path": str(tmp_path / "pipe.png")}]
    source = HubImages(DatasetSpec(name=str(parquet(tmp_path / "x.parquet", cells))))
    assert "regular file" in told(source)["pipe.png"]


def test_tables_that_are_none(tmp_path, odd):
    whole = parquet(tmp_path / "whole.parquet", [{"bytes": odd["deep.png"], "path": None}])
    content, middle = whole.read_bytes(), whole.stat().st_size // 2
    tables = {
        "cut": content[:middle],
        "empty": b"",
        "html": b"<html>",
        "no footer": content[:-9] + b"\xff" * 9,
    }
    for column, cells in (("number", [1, 2]), ("struct", [{"a": b"x"}])):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({column: cells}), file)
        tables[column] = file.getvalue()
    for name, data in tables.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            HubImages(DatasetSpec(name=str(path)))
        assert str(error.value).isprintable() and len(str(error.value)) < 400, name


def test_odd_names_are_split_and_limited_as_others(tmp_path, odd):
    folder = fill(tmp_path / "folder", odd)
    train, validation = open_images(folder, split_share=0.2, max_train_samples=5)
    names = {train.name(i) for i in range(len(train))}
    assert len(names) == 5 and not names & {validation.name(i) for i in range(len(validation))}
    batch = [EvalTransform(8)(train.read(i)) for i in range(5)]
    assert torch.stack(batch).isfinite().all()
