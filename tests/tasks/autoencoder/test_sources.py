"""The same images in every form: one loss curve; and streams."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentvae.data import SamplePhotos
from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.images import open_data
from tests.tasks.autoencoder.small import broken_off, small_config

pytestmark = pytest.mark.usefixtures("own_caches")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample photos, small, as a folder, as two tar shards and as a table with paths."""
    root = tmp_path_factory.mktemp("forms")
    photos = SamplePhotos("train")
    files: dict[str, bytes] = {}
    for index in range(len(photos)):
        content = io.BytesIO()
        photos.read(index).resize((72, 60), Image.Resampling.BILINEAR).save(content, "PNG")
        files[f"{Path(photos.name(index)).stem}.png"] = content.getvalue()
    (root / "folder").mkdir()
    for name, content in files.items():
        (root / "folder" / name).write_bytes(content)
    (root / "tar").mkdir()
    names = sorted(files, reverse=True)
    for shard, part in enumerate((names[::2], names[1::2])):
        with tarfile.open(root / "tar" / f"{shard}.tar", "w") as tar:
            for name in part:
                info = tarfile.TarInfo(name)
                info.size = len(files[name])
                tar.addfile(info, io.BytesIO(files[name]))
    cells = [{"bytes": files[name], "path": name} for name in names]
    pq.write_table(pa.table({"image": cells}), root / "table.parquet")
    return {"folder": root / "folder", "tar": root / "tar", "table": root / "table.parquet"}


def curve(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("time", "memory"))}
        for row in read_rows(run / "log.jsonl")
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / WEIGHTS)


@pytest.mark.slow
def test_every_form_trains_the_same_and_resumes_another(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"validation_share": 0.2, "log_steps": 1}
    for form, path in forms.items():
        train(small_config(tmp_path / form, train_data_dir=str(path), **options))
    folder = tmp_path / "folder"
    assert len(curve(folder)) > 6
    for form in ("tar", "table"):
        resumed = broken_off(tmp_path / form, tmp_path / f"{form}-resumed", update=4)
        train(small_config(resumed, train_data_dir=str(forms["folder"]), **options))
        for other in (tmp_path / form, resumed):
            assert curve(other) == curve(folder)
            found = weights(other)
            assert all(torch.equal(v, found[name]) for name, v in weights(folder).items())


def test_a_data_set_by_name_with_its_column_and_a_limit(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    table = pq.read_table(forms["table"])
    two = table.append_column("thumbnail", table.column("image"))
    pq.write_table(two, tmp_path / "two.parquet")
    options: dict[str, Any] = {"dataset_name": str(tmp_path / "two.parquet")}
    options |= {"train_data_dir": None, "max_train_steps": 2, "train_batch_size": 2}
    with pytest.raises(UserError, match="image, thumbnail"):
        train(small_config(tmp_path / "run", **options))
    options |= {"image_column": "image", "max_train_samples": 4}
    train(small_config(tmp_path / "run", **options))
    assert (tmp_path / "run" / "export" / WEIGHTS).exists()


def test_where_rows_are_numbered_their_column_may_not_change(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    """Named rows are the same images in any column; numbers are the same everywhere."""
    named = pq.read_table(forms["table"])
    bare = [{"bytes": cell["bytes"], "path": None} for cell in named["image"].to_pylist()]
    tables = {
        "named": pa.table({"image": named["image"], "other": named["image"]}),
        "bare": pa.table({"image": bare, "other": bare}),
    }
    options: dict[str, Any] = {"train_data_dir": None, "train_batch_size": 2}
    options |= {"lr_scheduler": "constant", "disc_scale": 0.0}
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        options |= {"dataset_name": str(tmp_path / f"{name}.parquet")}
        first = small_config(tmp_path / name, max_train_steps=1, image_column="image", **options)
        then = small_config(tmp_path / name, max_train_steps=2, image_column="other", **options)
        train(first)
        if name == "named":
            train(then)
            continue
        with pytest.raises(UserError, match="column: image then, other now"):
            train(then)


def test_a_stream_trains_exports_and_goes_on(
    forms: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(forms["table"], tmp_path / "stream.parquet")
    options: dict[str, Any] = {"dataset_name": str(tmp_path / "stream.parquet"), "streaming": True}
    options |= {"train_data_dir": None, "validation_data_dir": "samples", "shuffle_buffer": 4}
    options |= {"lr_scheduler": "constant", "log_steps": 1}
    train(small_config(tmp_path / "run", max_train_steps=2, **options))
    (tmp_path / "moved").mkdir()  # another place and buffer are the same stream
    shutil.move(tmp_path / "stream.parquet", tmp_path / "moved")
    options |= {"dataset_name": str(tmp_path / "moved" / "stream.parquet"), "shuffle_buffer": 3}
    shutil.copy(tmp_path / "moved" / "stream.parquet", tmp_path / "other.parquet")
    other = options | {"dataset_name": str(tmp_path / "other.parquet")}
    with pytest.raises(UserError, match=r"data set: stream\.parquet then, other\.parquet now"):
        train(small_config(tmp_path / "run", max_train_steps=4, **other))
    train(small_config(tmp_path / "run", max_train_steps=4, **options))
    assert "resumes only approximately" in caplog.text
    rows = [row for row in read_rows(tmp_path / "run" / "log.jsonl") if "loss/rec" in row]
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "export" / WEIGHTS).exists()


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="both name the training images"):
        small_config(tmp_path, dataset_name="a/b")
    with pytest.raises(UserError, match="streaming needs dataset_name"):
        small_config(tmp_path, streaming=True)
    with pytest.raises(
        UserError, match="streaming is for downloads, but the images of dataset_name 'samples'"
    ):
        small_config(tmp_path, train_data_dir=None, dataset_name="samples", streaming=True)
    with pytest.raises(UserError, match="does not work with streaming"):
        stream: dict[str, Any] = {"train_data_dir": None, "dataset_name": "a/b", "streaming": True}
        small_config(tmp_path, max_train_samples=5, **stream)


def test_the_sample_photos_keep_their_validation_photos(tmp_path: Path) -> None:
    for options in (
        {"cache_dir": str(tmp_path)},
        {"dataset_name": "samples", "train_data_dir": None},
    ):
        training, validation = open_data(small_config(tmp_path, **options))
        assert (len(training), len(validation)) == (21, 2)  # type: ignore[arg-type]
