"""Folders list what they should in one order, and refuse the rest in one sentence."""

import os

import pytest
from PIL import Image

from latentvae.data import ImageFolder, SamplePhotos, UnreadableImage
from latentvae.errors import UserError


def touch(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def test_names_are_relative_sorted_and_images_only(tmp_path):
    touch(
        tmp_path, "b/2.PNG", "b/1.jpg", "a.JpEg", "b/c/d.webp", "B.tif", "notes.txt", "b/noending"
    )
    touch(tmp_path, "._a.jpg", ".thumbnails/x.png", "__MACOSX/._a.jpg")
    folder = ImageFolder(tmp_path)
    names = [folder.name(index) for index in range(len(folder))]
    assert names == ["B.tif", "a.JpEg", "b/1.jpg", "b/2.PNG", "b/c/d.webp"]


def test_links_are_followed_once_and_a_dead_one_is_reported(tmp_path):
    touch(tmp_path, "real/1.jpg", "root/2.jpg")
    os.symlink(tmp_path / "real", tmp_path / "root" / "linked")
    os.symlink(tmp_path / "root", tmp_path / "root" / "linked" / "cycle")
    os.symlink(tmp_path / "real", tmp_path / "root" / "twice")
    os.symlink(tmp_path / "nowhere", tmp_path / "root" / "dead.jpg")
    folder = ImageFolder(tmp_path / "root")
    assert folder.names == ["2.jpg", "dead.jpg", "linked/1.jpg"]
    with pytest.raises(UnreadableImage, match="No such file"):
        folder.read(1)


def test_a_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    touch(tmp_path, "photos/1.jpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(ImageFolder("~/photos")) == 1


def test_names_that_are_not_utf8(tmp_path):
    file = os.fsencode(tmp_path) + b"/\xff.png"
    Image.new("RGB", (2, 2)).save(tmp_path / "ok.png")
    os.rename(tmp_path / "ok.png", file)
    assert ImageFolder(tmp_path).read(0).size == (2, 2)


def test_missing_folder_names_the_nearest(tmp_path):
    touch(tmp_path, "photos/1.jpg")
    with pytest.raises(UserError, match=r"no folder '.*photo'; did you mean 'photos'\?"):
        ImageFolder(tmp_path / "photo")
    with pytest.raises(UserError, match="Give a folder of images or 'samples'"):
        ImageFolder(tmp_path / "no" / "where")


def test_a_file_or_a_folder_without_images_is_refused(tmp_path):
    touch(tmp_path, "phone/1.heic", "phone/2.HEIC", "phone/notes.txt")
    with pytest.raises(UserError, match=r"no images in .* 2 \.heic"):
        ImageFolder(tmp_path / "phone")
    with pytest.raises(UserError, match="is a file"):
        ImageFolder(tmp_path / "phone" / "1.heic")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        ImageFolder(tmp_path / "empty")


def test_sample_photos_are_all_there_and_the_splits_are_apart():
    train, validation = SamplePhotos("train"), SamplePhotos("validation")
    assert (len(train), len(validation)) == (21, 2)
    names = [{photos.name(i) for i in range(len(photos))} for photos in (train, validation)]
    assert not names[0] & names[1]
    for photos in (train, validation):
        for index in range(len(photos)):
            assert min(photos.read(index).size) >= 170
    assert train.name(0) == "astronaut.png" and train.read(0).size == (512, 512)
    with pytest.raises(UserError, match="did you mean 'train'"):
        SamplePhotos("trian")
