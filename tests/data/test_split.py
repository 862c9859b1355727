"""No file is on both sides, the held-out files stay held out when others are added, and the form
that images are stored in changes neither the two sides nor a batch."""

import pickle
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentvae.data import (
    DatasetSpec,
    HubImages,
    ImageFolder,
    IndexSampler,
    SamplePhotos,
    TarShards,
    TrainImages,
    TrainTransform,
    open_images,
    open_source,
    spread,
    to_tensor,
    train_loader,
)
from latentvae.errors import UserError


def names(source):
    return [source.name(index) for index in range(len(source))]


def fill(root, count, start=0):
    root.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        (root / f"{index:04d}.jpg").write_bytes(b"x")


def held_out(root, **options):
    train, validation = open_images(root, **options)
    assert not set(names(train)) & set(names(validation))
    assert sorted(names(train) + names(validation)) == ImageFolder(root).names
    return set(names(validation))


def test_the_share_is_about_what_was_asked(tmp_path):
    fill(tmp_path, 1000)
    assert abs(len(held_out(tmp_path, split_share=0.2)) - 200) < 4 * (1000 * 0.2 * 0.8) ** 0.5


def test_adding_files_moves_none_of_the_others(tmp_path):
    fill(tmp_path, 200)
    before = held_out(tmp_path, split_share=0.1)
    old = set(ImageFolder(tmp_path).names)
    fill(tmp_path, 200, start=200)
    assert held_out(tmp_path, split_share=0.1) & old == before


def test_another_seed_holds_out_others_and_a_larger_share_holds_out_more(tmp_path):
    fill(tmp_path, 200)
    held = held_out(tmp_path, split_share=0.1, seed=0)
    assert held != held_out(tmp_path, split_share=0.1, seed=1)
    assert held < held_out(tmp_path, split_share=0.3, seed=0)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_at_least_one_is_held_out_and_one_kept(tmp_path, count, share):
    fill(tmp_path, count)
    assert len(held_out(tmp_path, split_share=share)) == (1 if share < 0.5 else count - 1)


def test_names_that_look_like_pages_are_images_of_their_own(tmp_path):
    for book in "ab":
        for page in range(100):
            (tmp_path / f"{book}-page{page:04d}.tif").write_bytes(b"x")
    assert len(held_out(tmp_path, split_share=0.02)) < 20


def test_what_cannot_be_split_is_refused(tmp_path):
    fill(tmp_path, 1)
    with pytest.raises(UserError, match="only one image"):
        open_images(tmp_path)
    fill(tmp_path, 5)
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            open_images(tmp_path, split_share=share)


def test_a_validation_folder_is_taken_whole_and_never_trained_on(tmp_path):
    fill(tmp_path / "all", 4)
    fill(tmp_path / "all" / "val", 3)
    fill(tmp_path / "other", 2)
    train, validation = open_images(tmp_path / "all", validation_data_dir=tmp_path / "other")
    assert (len(train), len(validation)) == (7, 2)
    train, validation = open_images(tmp_path / "all", validation_data_dir=tmp_path / "all" / "val")
    assert (len(train), len(validation)) == (4, 3)
    assert names(train) == [f"000{index}.jpg" for index in range(4)]
    with pytest.raises(UserError, match="every training image is also in the validation"):
        open_images(tmp_path / "all" / "val", validation_data_dir=tmp_path / "all")


def test_samples(tmp_path):
    train, validation = open_images("samples")
    assert (len(train), len(validation)) == (21, 2)
    fill(tmp_path, 3)
    train, validation = open_images("samples", validation_data_dir=tmp_path)
    assert (len(train), len(validation)) == (21, 3)
    train, validation = open_images(tmp_path, validation_data_dir="samples")
    assert isinstance(validation, SamplePhotos) and validation.name(0) == "chelsea.png"
    assert open_source("samples").name(0) == "chelsea.png" and len(open_source(tmp_path)) == 3


@pytest.fixture
def forms(tmp_path, own_caches, photos, files, make_tar, make_parquet):
    """The same pictures as a folder, over three tar files, and as a table in another order."""
    parts = list(files.items())
    for number in range(3):
        make_tar(tmp_path / "shards" / f"{number}.tar", dict(parts[number::3]))
    cells = [{"bytes": data, "path": name} for name, data in reversed(parts)]
    return photos, tmp_path / "shards", make_parquet(tmp_path / "set" / "train.parquet", cells)


def batches(source, *, num_workers=0, start_step=0):
    sampler = IndexSampler(len(source), 3, seed=5, start_step=start_step)
    dataset = TrainImages(source, TrainTransform(16, random_flip=True), seed=5)
    loader = train_loader(dataset, sampler, num_workers=num_workers)
    return [batch.images for batch in islice(loader, 7 - start_step)]


def test_folder_tars_and_table_give_the_same_sides_and_the_same_batches(forms):
    found = [open_images(form, split_share=0.25, seed=1) for form in forms]
    assert [type(train.source) for train, _ in found] == [ImageFolder, TarShards, HubImages]
    expected = batches(found[0][0])
    for train, validation in found[1:]:
        assert names(validation) == names(found[0][1]) and 0 < len(validation) < 6
        assert names(train) == names(found[0][0])
        assert all(map(torch.equal, batches(train), expected))
        assert all(map(torch.equal, batches(train, start_step=5), expected[5:]))
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("form", [1, 2])
def test_workers_read_tars_and_tables_as_this_process_does(forms, form):
    train, _ = open_images(forms[form], split_share=0.25, seed=1)
    assert all(map(torch.equal, batches(train, num_workers=2), batches(train)))
    again = pickle.loads(pickle.dumps(train))
    assert all(map(torch.equal, batches(again), batches(train)))


def test_a_spec_is_told_by_what_is_there(forms, tmp_path, files):
    folder, shards, table = forms
    expected = {
        folder: ImageFolder,
        shards: TarShards,
        shards / "1.tar": TarShards,
        shards / "{0..2}.tar": TarShards,
        table: HubImages,
        table.parent: HubImages,
        DatasetSpec(name=str(folder)): HubImages,
        DatasetSpec(name=str(shards)): TarShards,
        DatasetSpec(name=str(table.parent), image_column="image"): HubImages,
        DatasetSpec(name="samples", split="validation"): SamplePhotos,
    }

    # each spec opens its kind of source
    for spec, kind in expected.items():
        assert type(open_source(spec)) is kind, spec
    assert len(open_source(DatasetSpec(name="samples", split="validation"))) == 2

    # a folder with shards and an image
    (shards / "preview.png").write_bytes(next(iter(files.values())))
    assert type(open_source(shards)) is ImageFolder

    # folders without images
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("x")
    with pytest.raises(UserError, match="no images in"):
        open_source(tmp_path / "notes")
    with pytest.raises(UserError, match=r"no folder '.*nowhere'"):
        open_source(tmp_path / "nowhere")


def test_a_split_of_a_folder_is_that_of_datasets(photos, tmp_path):
    root = tmp_path / "split"
    root.mkdir()
    for split, folder in (("train", "a"), ("validation", "b")):
        (photos / folder).rename(root / split)
    for split in ("train", "validation"):
        source, plain = open_source(DatasetSpec(name=str(root), split=split)), root / split
        assert names(source) == ImageFolder(plain).names
        assert torch.equal(to_tensor(source.read(0)), to_tensor(ImageFolder(plain).read(0)))
    train, held = open_images(DatasetSpec(name=str(root)), split_share=0.3)
    assert sorted(names(train) + names(held)) == ImageFolder(root / "train").names
    assert len(open_source(root)) == 12  # without options it is whole
    with pytest.raises(UserError, match=r"no split 'validatoin'.*validation"):
        open_source(DatasetSpec(name=str(root), split="validatoin"))


def test_files_of_a_table_that_are_validated_on_are_not_trained_on(photos):
    train, validation = open_images(DatasetSpec(name=str(photos)), validation_data_dir=photos / "b")
    assert names(train) == [f"a/{name}" for name in ImageFolder(photos / "a").names]
    assert names(validation) == ImageFolder(photos / "b").names


def test_paths_from_the_current_folder_are_files_too(photos, tmp_path, monkeypatch):
    """A table of paths that are relative to where the command runs, and the folder of its files."""
    pictures = ImageFolder(photos / "a").names
    monkeypatch.chdir(photos)
    pq.write_table(pa.table({"image": [f"a/{name}" for name in pictures]}), tmp_path / "t.parquet")
    for table in (tmp_path / "t.parquet", photos / "t.parquet"):
        if not table.exists():
            (tmp_path / "t.parquet").rename(table)
        spec = DatasetSpec(name=str(table), image_column="image")
        with pytest.raises(UserError, match="every training image is also in the validation"):
            open_images(spec, validation_data_dir=photos / "a")


def test_bytes_in_a_table_are_no_file_of_the_current_folder(photos, files, tmp_path, monkeypatch):
    rows = [{"bytes": data, "path": Path(name).name} for name, data in files.items()]
    (tmp_path / "here").mkdir()
    for name in files:
        (tmp_path / "here" / Path(name).name).write_bytes(files[name])
    datasets.Dataset.from_dict({"image": rows}).to_parquet(str(photos / "t.parquet"))
    monkeypatch.chdir(tmp_path / "here")
    train, validation = open_images(photos / "t.parquet", validation_data_dir=tmp_path / "here")
    assert (len(train), len(validation)) == (12, 12)


def test_splits_of_a_saved_data_set_share_no_files(tmp_path, files):
    rows = [{"bytes": data, "path": Path(name).name} for name, data in files.items()]
    splits = {
        "train": datasets.Dataset.from_dict({"image": rows[:8]}),
        "validation": datasets.Dataset.from_dict({"image": rows[8:]}),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    train, validation = open_images(
        DatasetSpec(name=str(tmp_path / "saved")), validation_data_dir=tmp_path / "saved"
    )
    assert (len(train), len(validation)) == (8, 4)


def test_tar_files_have_no_splits_or_columns(forms):
    shards = forms[1]
    for name in (shards, shards / "1.tar", shards / "{0..2}.tar"):
        for option in ({"split": "validation"}, {"image_column": "jpg"}, {"config_name": "big"}):
            with pytest.raises(UserError, match="names tar files, whose images are all used"):
                open_source(DatasetSpec(name=str(name), **option))
    for folder, number in (("train", 0), ("validation", 1)):
        (shards / folder).mkdir()
        (shards / f"{number}.tar").rename(shards / folder / "x.tar")
    with pytest.raises(
        UserError, match=r"tar files of the splits train, validation\. Give the tar"
    ):
        open_source(DatasetSpec(name=str(shards)))
    assert len(open_source(DatasetSpec(name=str(shards / "train")))) == 4


def test_what_is_validated_on_is_not_trained_on(forms, tmp_path):
    folder, shards, table = forms
    train, validation = open_images(shards, validation_data_dir=shards / "1.tar")
    assert (len(train), len(validation)) == (8, 4) and not set(names(train)) & set(
        names(validation)
    )
    for form in (shards, table):
        with pytest.raises(UserError, match="every training image is also in the validation"):
            open_images(form, validation_data_dir=form)
    train, validation = open_images(table, validation_data_dir=folder)
    assert (len(train), len(validation)) == (12, 12)


def test_links_to_validation_files_are_not_trained_on(tmp_path):
    fill(tmp_path / "a", 6)
    fill(tmp_path / "b", 3, start=10)
    (tmp_path / "a" / "soft.jpg").symlink_to(tmp_path / "b" / "0010.jpg")
    (tmp_path / "a" / "hard.jpg").hardlink_to(tmp_path / "b" / "0011.jpg")
    (tmp_path / "a" / "other.jpg").hardlink_to(tmp_path / "a" / "0000.jpg")
    (tmp_path / "a" / "folder").symlink_to(tmp_path / "b")
    train, validation = open_images(tmp_path / "a", validation_data_dir=tmp_path / "b")
    assert (len(train), len(validation)) == (7, 3)
    assert not {"soft.jpg", "hard.jpg", "folder/0012.jpg"} & set(names(train))


def test_links_without_an_image_are_found_on_both_sides(tmp_path):
    fill(tmp_path / "a", 2)
    fill(tmp_path / "a" / "val", 1, start=10)
    (tmp_path / "a" / "val" / "loop.png").symlink_to("loop.png")
    (tmp_path / "a" / "val" / "dead.png").symlink_to("nowhere.png")
    (tmp_path / "b").symlink_to(tmp_path / "a" / "val")
    for validation in (tmp_path / "a" / "val", tmp_path / "b"):
        train, _ = open_images(tmp_path / "a", validation_data_dir=validation)
        assert names(train) == ["0000.jpg", "0001.jpg"]


def test_a_table_within_the_trained_folder_is_an_overlap(tmp_path, own_caches, files, make_parquet):
    parts = [{"bytes": data, "path": name} for name, data in files.items()]
    for number in range(2):
        make_parquet(tmp_path / "set" / f"train-{number}.parquet", parts[number * 4 :][:4])
    train, validation = tmp_path / "set", tmp_path / "set" / "train-1.parquet"
    for pair in ((train, validation), (validation, train)):
        with pytest.raises(UserError, match=r"train-1\.parquet' is a file of both the training"):
            open_images(pair[0], validation_data_dir=pair[1])
    make_parquet(tmp_path / "set" / "test-0.parquet", parts[8:])
    # A file of another split is not trained on.
    kept, held = open_images(train, validation_data_dir=tmp_path / "set" / "test-0.parquet")
    assert (len(kept), len(held)) == (8, 4)


def test_max_train_samples_takes_a_nested_spread_share(tmp_path):
    fill(tmp_path, 400)
    every, validation = open_images(tmp_path, split_share=0.1)
    subsets = []
    for count in (50, 100):
        train, held = open_images(tmp_path, split_share=0.1, max_train_samples=count)
        assert names(held) == names(validation) and len(train) == count
        assert names(train) == sorted(names(train))
        subsets.append(set(names(train)))
    assert subsets[0] < subsets[1] < set(names(every))
    assert 10 < sum(name < "0200" for name in subsets[0]) < 40
    train, _ = open_images(tmp_path, split_share=0.1, max_train_samples=10_000)
    assert names(train) == names(every)
    with pytest.raises(UserError, match=r"max_train_samples must be at least 1 \(got 0\)"):
        open_images(tmp_path, max_train_samples=0)


def test_spread_is_even_and_starts_at_the_first() -> None:
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, None) == spread(3, 7) == [0, 1, 2]
    with pytest.raises(UserError, match="at least 1"):
        spread(3, 0)
