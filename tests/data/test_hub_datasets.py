"""Tables of images: the same pixels and names as files, whatever the table; one line where not."""

import io
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from latentvae.data import (
    DatasetSpec,
    HubImages,
    ImageFolder,
    ImageStream,
    UnreadableImage,
    open_source,
    read_image,
)
from latentvae.data.hub_datasets import local_files, open_rows, undecoded
from latentvae.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches")


def cells(files, paths=True):
    return [{"bytes": data, "path": name if paths else None} for name, data in files.items()]


def images(path, **options):
    return HubImages(DatasetSpec(name=str(path), **options))


def same_images(source, files):
    for index in range(len(source)):
        expected = read_image(files[source.name(index)])
        assert source.read(index).tobytes() == expected.tobytes()


def test_without_paths_the_rows_keep_their_order(tmp_path, files, make_parquet):
    source = images(make_parquet(tmp_path / "x.parquet", cells(files, paths=False)))
    assert source.names == [f"train/{row:09d}" for row in range(12)]
    for index, data in enumerate(files.values()):
        assert source.read(index).tobytes() == read_image(data).tobytes()


def test_paths_that_do_not_tell_rows_apart_are_not_names(tmp_path, files, make_parquet):
    data = list(files.values())
    stored = ["0.png", "0.png", "../../b.png", None, "/b.png"]
    rows = [{"bytes": data[i], "path": path} for i, path in enumerate(stored)]
    source = images(make_parquet(tmp_path / "x.parquet", rows))
    assert source.names == [f"train/{row:09d}" for row in range(5)]
    rows[4]["path"] = "/home/me/c.png"
    source = images(make_parquet(tmp_path / "y.parquet", rows))
    assert source.names == ["b.png", "c.png", *(f"train/{row:09d}" for row in (0, 1, 3))]


def test_files_are_decoded_as_from_a_folder(tmp_path, make_parquet):
    """EXIF orientation, 16 bits and transparency: the datasets library decodes them otherwise."""
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "turned.jpg": (Image.new("RGB", (9, 5), "red"), {"exif": turned}),
        "deep.png": (Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)), {}),
        "clear.png": (Image.new("RGBA", (3, 3), (0, 0, 255, 51)), {}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, "JPEG" if name.endswith("jpg") else "PNG", **options)
        files[name] = file.getvalue()
    source = images(make_parquet(tmp_path / "x.parquet", cells(files)))
    same_images(source, files)
    assert source.read(2).size == (5, 9) and source.names[2] == "turned.jpg"
    assert source.read(1).getpixel((0, 0)) == (156, 156, 156)  # 40000 / 257


def test_nothing_is_written_beside_the_data(tmp_path, files, make_parquet):
    path = make_parquet(tmp_path / "data" / "x.parquet", cells(files))
    for name in (path, path.parent):
        images(name, cache_dir=str(tmp_path / "kept"))
    assert [file.name for file in path.parent.rglob("*")] == ["x.parquet"]
    assert any((tmp_path / "kept").rglob("*.arrow"))


def test_every_kind_of_table(tmp_path, files, make_parquet):
    """A plain column of bytes, arrow files, and what `save_to_disk` writes, alone and by split."""
    files = {name.split("/")[1]: data for name, data in files.items()}  # `datasets` keeps the last
    names, data = list(files), list(files.values())
    plain = tmp_path / "plain.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": names, "jpg": data}), plain)
    assert images(plain).read(3).tobytes() == read_image(data[3]).tobytes()
    rows = datasets.Dataset.from_dict(
        {"photo": cells(files)}, features=datasets.Features({"photo": datasets.Image()})
    )
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "both")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in (tmp_path / "saved", tmp_path / "both", arrow):
        source = images(path)
        assert source.names == sorted(names)
        same_images(source, files)
    assert len(images(tmp_path / "both", split="test")) == 1
    assert (
        images(tmp_path / "saved").read(0, at_least=8).size
        == read_image(files[source.name(0)]).size
    )


def test_splits(tmp_path, files, make_parquet):
    make_parquet(tmp_path / "set" / "train-00000-of-00001.parquet", cells(files))
    make_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", cells(files)[:2])
    assert len(images(tmp_path / "set")) == 12 and len(images(tmp_path / "set", split="test")) == 2
    with pytest.raises(UserError, match=r"no split 'tests', only .*did you mean 'test'"):
        images(tmp_path / "set", split="tests")
    alone = make_parquet(tmp_path / "alone.parquet", cells(files))
    assert len(images(alone)) == len(open_source(alone, split="validation")) == 12
    for split in ("validation", "tset", "train[:3]"):
        with pytest.raises(UserError, match=f"no split '{re.escape(split)}', only train"):
            images(alone, split=split)


def test_the_column_of_images(tmp_path, files, make_parquet):
    x = cells(files)
    assert images(make_parquet(tmp_path / "a.parquet", x, column="img")).column == "img"

    # two columns of images
    path = tmp_path / "two.parquet"
    struct = pyarrow.array(
        x, type=pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    )
    numbers = list(range(12))
    pyarrow.parquet.write_table(
        pyarrow.table({"left": struct, "right": struct, "label": numbers}), path
    )
    with pytest.raises(
        UserError, match=r"several columns of images \(left, right\)\. Its columns "
    ):
        images(path)
    assert images(path, image_column="right").column == "right"
    with pytest.raises(UserError, match=r"no column 'rigth', .*did you mean 'right'"):
        images(path, image_column="rigth")
    with pytest.raises(
        UserError,
        match=r"column 'label' holds .*int64.*, not images\. Columns of images: left, right",
    ):
        images(path, image_column="label")

    # no column of images
    pyarrow.parquet.write_table(pyarrow.table({"label": numbers}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"no image column\. Its columns are label"):
        images(tmp_path / "none.parquet")


def test_a_null_and_a_broken_image_are_unreadable_images(tmp_path, files, make_parquet):
    good = next(iter(files.values()))
    rows = [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"<html>", "path": "x.png"},
        {"bytes": None, "path": "nowhere/y.png"},
        {"bytes": good, "path": None},
    ]
    source = images(make_parquet(tmp_path / "x.parquet", rows))
    reasons = {}
    for index in range(5):
        try:
            assert source.read(index).tobytes() == read_image(good).tobytes()
        except UnreadableImage as error:
            assert error.name == source.name(index)
            reasons[error.name] = error.reason
    assert len(reasons) == 4 and "No such file" in reasons["nowhere/y.png"]
    assert reasons["x.png"] == "not an image of a known format"
    assert reasons["train/000000000"] == reasons["train/000000001"] == "the row has no image"


def test_a_hub_folder_of_image_files(photos, files, monkeypatch):
    """Its rows hold the paths of what was downloaded; names are relative to that folder."""
    downloaded = datasets.load_dataset("imagefolder", data_dir=str(photos))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: downloaded)
    source = images("user/photos")
    assert source.names == ImageFolder(photos).names
    same_images(source, files)


def test_damaged_and_missing_tables_are_one_sentence(tmp_path, files, make_parquet, monkeypatch):
    path = make_parquet(tmp_path / "x.parquet", cells(files))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"data set '.*x\.parquet' cannot be opened: [^\n]+$"):
        images(path)
    make_parquet(tmp_path / "empty.parquet", [])
    with pytest.raises(UserError, match=r"empty.parquet"):
        images(tmp_path / "empty.parquet")

    def unreachable(*_, **__):
        raise ConnectionError(
            "Couldn't reach 'user/photos' on the Hub (OfflineModeIsEnabled)\nmore"
        )

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"'user/photos' cannot be opened: Couldn't reach [^\n]*$"):
        images("user/photos")


def test_pattern_characters_in_a_path_mean_themselves(tmp_path, make_parquet, files):
    """`run [1]` is not `run 1`, `a*b` is not `axb`: as a file, a folder and a folder of images."""
    names = ("run [1]", "run 1", "a*b", "axb")
    for label, name in enumerate(names):
        rows = cells(dict(list(files.items())[label : label + 1]), paths=False)
        table = make_parquet(tmp_path / name / "train.parquet", rows)
        for path in (table, table.parent):
            source = images(path, any_split=True)
            assert len(source) == 1
            same = read_image(list(files.values())[label])
            assert source.read(0).tobytes() == same.tobytes()
            stored = local_files(source.spec, source.origin[2])
            assert stored == {table.resolve()}
        shown = next(iter(stream_rows(table)))
        assert shown["image"]["bytes"] == list(files.values())[label]
    for name, colour in (("img [1]", "red"), ("img 1", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), colour).save(tmp_path / name / "x[1].png")
    found = images(tmp_path / "img [1]").read(0)
    assert found.getpixel((0, 0)) == (255, 0, 0)


def stream_rows(table):
    rows, _ = open_rows(DatasetSpec(name=str(table)), streaming=True)
    return undecoded(rows, "image")


def test_columns_of_paths_and_structs_of_bytes_are_read(tmp_path, files):
    names, data = list(files), list(files.values())
    for name, file in files.items():
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(file)
    table = pyarrow.table(
        {
            "file": [f"pictures/{name}" for name in names],
            "whole": [str(tmp_path / "pictures" / name) for name in names],
            "only": [{"bytes": file} for file in data],
            "caption": ["a photo"] * len(names),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")

    # read each column of paths
    for column in ("file", "whole"):
        source = images(tmp_path / "x.parquet", image_column=column)
        assert [name.removeprefix("pictures/") for name in source.names] == sorted(names)
        for index in range(0, len(source), 5):
            expected = read_image(files[source.name(index).removeprefix("pictures/")])
            assert source.read(index).tobytes() == expected.tobytes()
            assert source.size(index) == expected.size
        assert all(file.is_file() for file in source.files())

    # read the column of bytes
    found = images(tmp_path / "x.parquet")  # the only column of files
    assert found.column == "only" and found.read(3).tobytes() == read_image(data[3]).tobytes()
    stream = ImageStream(
        DatasetSpec(name=str(tmp_path / "x.parquet"), image_column="file"), held_out=2
    )
    assert stream.held_out.files[1][1] == data[1]

    # columns without images
    with pytest.raises(UnreadableImage, match="No such file"):
        images(tmp_path / "x.parquet", image_column="caption").read(0)
    pyarrow.parquet.write_table(table.select(["file", "caption"]), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"no image column\. .*may be paths: file, caption"):
        images(tmp_path / "y.parquet")


def test_the_advice_for_a_column_of_lists_works(tmp_path, files, monkeypatch):
    rows = datasets.Dataset.from_dict(
        {"views": [[{"bytes": data, "path": None}] * 2 for data in list(files.values())[:3]]},
        features=datasets.Features({"views": datasets.List(datasets.Image())}),
    )
    rows.to_parquet(tmp_path / "lists.parquet")
    for options in ({}, {"image_column": "views"}):
        with pytest.raises(UserError, match="holds a list of images in each row") as error:
            images(tmp_path / "lists.parquet", **options)
    monkeypatch.chdir(tmp_path)
    advice = [part for part in str(error.value).split("`") if part.startswith("rows.")]
    names = {name: getattr(datasets, name) for name in ("List", "Image", "Features")}
    eval(advice[0], {"rows": rows, **names})
    source = images(tmp_path / "images.parquet")
    assert len(source) == 6
    assert source.read(2).tobytes() == read_image(list(files.values())[1]).tobytes()
