"""Files that are not used: arrays beside an image, and the one line that counts the rest."""

import pytest

from latentvae.data import ImageFolder, TarShards
from latentvae.data.left_out import belongs_to, side_cars, stem
from latentvae.errors import UserError

SLICES = [f"patient7.slice{i:03d}.npy" for i in range(40)]


@pytest.mark.parametrize(
    ("array", "image", "beside"),
    [
        ("0001.npy", "0001.jpg", True),
        ("0001.latent.npy", "0001.jpg", True),
        ("0001.jpg.npy", "0001.jpg", True),
        ("v1.2.npy", "v1.2.png", True),
        ("v1.3.npy", "v1.2.png", False),
        ("patient7.slice000.npy", "patient7.overview.png", False),
        ("a.b/1.npy", "a.b/2.png", False),
        ("b/0001.npy", "a/0001.jpg", False),
        ("00010.npy", "0001.jpg", False),
    ],
)
def test_a_side_car_shares_the_whole_stem_of_an_image(array, image, beside):
    assert side_cars([array, image]) == ({array} if beside else set())
    assert belongs_to(array, {stem(image)}) is beside


@pytest.fixture(params=["folder", "tar"])
def opened(request, tmp_path, make_tar):
    """Opens a folder or a tar file with members of these names."""

    def build(names: list[str]):
        if request.param == "tar":
            return TarShards(make_tar(tmp_path / "x.tar", {name: b"x" for name in names}))
        for name in names:
            file = tmp_path / "folder" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
        return ImageFolder(tmp_path / "folder")

    return build


def test_arrays_with_dots_in_their_names_are_images(opened, caplog):
    source = opened([*SLICES, "patient7.overview.png"])
    assert len(source) == 41 and source.names[1:] == SLICES
    assert not caplog.records


def test_what_is_not_used_is_counted_in_one_line(opened, caplog):
    names = ["1.jpg", "2.jpg", "2.txt", "2.cls", "1.latent.npy", "2.npy", "raw/1.CR2", "raw/2.cr2"]
    source = opened([*names, "notes.txt", "LICENSE", ".DS_Store"])
    assert source.names == ["1.jpg", "2.jpg"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "2 images are used. Not used: " in line
    for counted in ("2 .npy beside an image", "2 .cr2", "1 .txt", "1 without a suffix"):
        assert counted in line
    assert ".cls" not in line


def test_counts_of_a_tar_file_come_from_its_index_too(tmp_path, make_tar, caplog):
    shard = make_tar(tmp_path / "x.tar", {"1.jpg": b"x", "1.npy": b"x"})
    lines = []
    for _ in range(2):
        caplog.clear()
        TarShards(shard)
        lines.append(caplog.messages)
    assert lines[0] == lines[1] and len(lines[0]) == 1


def test_only_the_first_rank_says_it(opened, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    opened(["1.jpg", "2.xyz"])
    assert not caplog.records


def test_without_any_image_the_error_counts_the_files(opened):
    with pytest.raises(UserError, match=r"no images in .* 2 \.xyz, 1 \.doc"):
        opened(["1.xyz", "2.xyz", "3.doc"])
