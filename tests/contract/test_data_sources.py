"""What every form of images keeps: the same pictures give the same names and numbers.

A new form is an entry of `SOURCES`, and a way to write it here. What is particular to one is tested
in tests/data.
"""

import gc
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from latentvae.data import (
    DatasetSpec,
    ImageSource,
    ImageStream,
    PixelFormat,
    Subset,
    UnreadableImage,
    open_source,
    read_image,
    to_tensor,
)
from latentvae.data.split import SOURCES, Form

Files = dict[str, bytes]


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches of tar indices and of `datasets` in a folder of this module's own."""
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "datasets"))
        # What `datasets` sleeps when a stream is dropped, for pyarrow's threads to end.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        datasets.disable_progress_bars()
        yield
        gc.collect()  # streams that are dropped later would sleep in another test


def encoded(array: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def make_files() -> Files:
    """Pictures of several kinds, sizes and depths, in an order that is not the names'."""
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF orientation: a quarter turn
    smooth = np.linspace(0, 255, 120 * 200 * 3).reshape(120, 200, 3).astype(np.uint8)
    return {
        "b/rgb.png": encoded(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8), "PNG"),
        "a/turned.jpg": encoded(smooth, "JPEG", exif=turned),
        "c.webp": encoded(smooth[:30, :40], "WEBP", lossless=True),
        "a/deep.png": encoded(rng.integers(0, 2**16, (9, 8), dtype=np.uint16), "PNG"),
        "b/alpha.png": encoded(rng.integers(0, 256, (7, 6, 4), dtype=np.uint8), "PNG"),
    }


def write_folder(root: Path, files: Files) -> Any:
    for name, data in files.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(data)
    return root / "folder"


def write_tars(root: Path, files: Files) -> Any:
    (root / "shards").mkdir()
    for number in range(2):
        with tarfile.open(root / "shards" / f"{number}.tar", "w") as tar:
            for name in list(files)[number::2]:
                member = tarfile.TarInfo(name)
                member.size = len(files[name])
                tar.addfile(member, io.BytesIO(files[name]))
    return root / "shards"


def table(cells: list[dict[str, Any]]) -> pyarrow.Table:
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    return pyarrow.table({"image": pyarrow.array(cells, type=kind)})


def write_parquet(root: Path, files: Files) -> Any:
    cells = [{"bytes": data, "path": name} for name, data in files.items()]
    pyarrow.parquet.write_table(table(cells), root / "images.parquet")
    return root / "images.parquet"


def write_paths(root: Path, files: Files) -> Any:
    """A table whose cells name files."""
    folder = write_folder(root, files)
    cells = [{"bytes": None, "path": str(folder / name)} for name in files]
    pyarrow.parquet.write_table(table(cells), root / "paths.parquet")
    return root / "paths.parquet"


def write_saved(root: Path, files: Files) -> Any:
    """What `save_to_disk` writes: arrow files."""
    cells = [{"bytes": data, "path": name} for name, data in files.items()]
    rows = datasets.Dataset.from_dict({"image": cells})
    rows.save_to_disk(str(root / "saved"))
    return root / "saved"


WRITERS: dict[str, tuple[Form, Callable[[Path, Files], Any]]] = {
    "folder": ("folder", write_folder),
    "tar": ("tar", write_tars),
    "parquet": ("table", write_parquet),
    "paths": ("table", write_paths),
    "saved": ("table", write_saved),
}
STREAM = "first rows of a stream"
OWN_PICTURES: set[Form] = {"samples", "sprites"}  # forms that hold pictures of their own
WRITTEN = pytest.mark.parametrize("form", [*WRITERS, STREAM])


def open_form(
    form: str, root: Path, files: Files, *, pixels: PixelFormat | None = None
) -> ImageSource:
    if form == STREAM:  # which keeps the order of its rows
        path = write_parquet(root, dict(sorted(files.items())))
        spec = DatasetSpec(name=str(path))
        return ImageStream(spec, held_out=len(files), pixels=pixels).held_out
    return open_source(WRITERS[form][1](root, files), pixels=pixels)


def names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def tensors(source: ImageSource) -> list[torch.Tensor]:
    return [to_tensor(source.read(index)) for index in range(len(source))]


def test_every_form_is_written_here() -> None:
    assert {form for form, _ in WRITERS.values()} | OWN_PICTURES == set(SOURCES)


@pytest.mark.parametrize("form", WRITERS)
def test_it_is_told_by_what_is_there(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, write = WRITERS[form]
    chosen: list[Form] = []
    for name, opener in list(SOURCES.items()):
        monkeypatch.setitem(
            SOURCES, name, lambda *a, n=name, o=opener: (chosen.append(n), o(*a))[1]
        )
    open_source(write(tmp_path, make_files()))
    assert chosen == [kind]


@WRITTEN
def test_names_are_sorted_and_pixels_those_of_the_files(form: str, tmp_path: Path) -> None:
    files = make_files()
    source = open_form(form, tmp_path, files)
    assert len(source) == len(files) and names(source) == sorted(files)
    expected = [to_tensor(read_image(files[name])) for name in sorted(files)]
    found = tensors(source)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, tensors(source), found))  # again
    assert all(value.isfinite().all() and value.abs().max() <= 1 for value in found)


@WRITTEN
def test_pixels_are_as_asked(form: str, tmp_path: Path) -> None:
    files, pixels = make_files(), PixelFormat(channels=4)
    source = open_form(form, tmp_path, files, pixels=pixels)
    expected = [to_tensor(read_image(files[name], pixels=pixels)) for name in sorted(files)]
    assert all(map(torch.equal, tensors(source), expected))


@WRITTEN
def test_size_is_that_of_what_is_read(form: str, tmp_path: Path) -> None:
    source = open_form(form, tmp_path, make_files())
    for index in range(len(source)):
        assert source.size(index) == source.read(index).size, source.name(index)


@WRITTEN
def test_a_smaller_jpeg_may_be_asked_for(form: str, tmp_path: Path) -> None:
    files = make_files()
    source = open_form(form, tmp_path, files)
    for index, name in enumerate(sorted(files)):
        smaller, expected = source.read(index, at_least=16), read_image(files[name], at_least=16)
        assert torch.equal(to_tensor(smaller), to_tensor(expected))
        assert min(smaller.size) >= min(16, *source.size(index))
    turned = sorted(files).index("a/turned.jpg")
    assert source.read(turned, at_least=16).size < source.size(turned)


@WRITTEN
def test_an_unreadable_member_is_named_and_the_others_are_read(form: str, tmp_path: Path) -> None:
    files = make_files()
    broken = {"empty.png": b"", "page.png": b"<html>", "short.png": files["b/rgb.png"][:60]}
    source = open_form(form, tmp_path, files | broken)
    for index, name in enumerate(sorted(files | broken)):
        if name in files:
            assert torch.equal(to_tensor(source.read(index)), to_tensor(read_image(files[name])))
            continue
        with pytest.raises(UnreadableImage, match=name) as error:
            source.read(index)
        assert error.value.name.endswith(name) and error.value.reason
        again = pickle.loads(pickle.dumps(error.value))  # as a worker sends it
        assert (again.name, again.reason) == (error.value.name, error.value.reason)
        if name != "short.png":  # whose header is whole
            with pytest.raises(UnreadableImage, match=name):
                source.size(index)


@WRITTEN
def test_a_copy_sent_to_a_worker_is_the_same(form: str, tmp_path: Path) -> None:
    source = open_form(form, tmp_path, make_files())
    for each in (source, Subset(source, [3, 1])):
        copy = pickle.loads(pickle.dumps(each))
        assert names(copy) == names(each)
        assert all(map(torch.equal, tensors(copy), tensors(each)))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_sample_photos_keep_it_too(split: str) -> None:
    source = open_source("samples", split=split)
    assert names(source) == sorted(names(source)) == names(open_source("samples", split=split))
    copy = pickle.loads(pickle.dumps(source))
    assert all(map(torch.equal, tensors(copy), tensors(source)))
    for index in range(len(source)):
        assert source.size(index) == source.read(index).size
