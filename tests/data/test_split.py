"""No file is on both sides, and the held-out files stay held out when others are added."""

import pytest

from latentvae.data import ImageFolder, SamplePhotos, open_images, open_source
from latentvae.errors import UserError


def fill(root, count, start=0):
    root.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        (root / f"{index:04d}.jpg").write_bytes(b"x")


def held_out(root, **options):
    train, validation = open_images(root, **options)
    assert isinstance(train, ImageFolder) and isinstance(validation, ImageFolder)
    assert not set(train.names) & set(validation.names)
    assert sorted(train.names + validation.names) == ImageFolder(root).names
    return set(validation.names)


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


def test_what_cannot_be_split_is_refused(tmp_path):
    fill(tmp_path, 1)
    with pytest.raises(UserError, match="one image only"):
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
    assert [train.name(index) for index in range(4)] == [f"000{index}.jpg" for index in range(4)]
    with pytest.raises(UserError, match="is also in the validation folder"):
        open_images(tmp_path / "all" / "val", validation_data_dir=tmp_path / "all")


def test_samples(tmp_path):
    train, validation = open_images("samples")
    assert (len(train), len(validation)) == (13, 2)
    fill(tmp_path, 3)
    train, validation = open_images("samples", validation_data_dir=tmp_path)
    assert (len(train), len(validation)) == (13, 3)
    train, validation = open_images(tmp_path, validation_data_dir="samples")
    assert isinstance(validation, SamplePhotos) and validation.name(0) == "chelsea.png"
    assert open_source("samples").name(0) == "chelsea.png" and len(open_source(tmp_path)) == 3
