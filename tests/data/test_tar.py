"""Tar shards give what the folder gives, by offset; hostile and damaged ones cost one line."""

import gzip
import io
import logging
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from latentvae.data import TarShards, UnreadableImage, read_image
from latentvae.data import tar_index as tar_index_module
from latentvae.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def shards(tmp_path, files, make_tar):
    """The twelve pictures over three shards, with labels between them."""
    parts = list(files.items())
    for number in range(3):
        members = {}
        for name, data in parts[number::3]:
            members |= {name.replace(".png", ".cls"): b"7", name: data}
        make_tar(tmp_path / "shards" / f"{number:03d}.tar", members)
    return tmp_path / "shards"


def cached(path):
    return path.with_name(f".{path.name}.index.npz")


@pytest.fixture
def walks(monkeypatch):
    """Counts the shards whose headers are walked."""
    walked = []
    walk = tar_index_module._walk

    def counting(path, size):
        walked.append(path.name)
        return walk(path, size)

    monkeypatch.setattr(tar_index_module, "_walk", counting)
    return walked


def test_the_index_is_walked_once_and_again_when_the_shard_changes(shards, walks, make_tar, files):
    first = TarShards(shards)
    assert walks == ["000.tar", "001.tar", "002.tar"]
    again = TarShards(shards)
    assert len(walks) == 3 and again.names == first.names
    assert again.read(5).tobytes() == first.read(5).tobytes()
    make_tar(shards / "001.tar", {"new.png": next(iter(files.values()))})
    assert "new.png" in TarShards(shards).names and walks[3:] == ["001.tar"]
    stat = (shards / "001.tar").stat()
    os.utime(shards / "001.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert TarShards(shards / "001.tar").names == ["new.png"] and walks[4:] == ["001.tar"]


def test_a_damaged_index_is_rebuilt(shards, walks):
    names, place = TarShards(shards / "000.tar").names, cached(shards / "000.tar")
    whole = place.read_bytes()
    cuts = [whole[:end] for end in range(0, len(whole), 97)]
    flips = [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in range(0, len(whole), 89)]
    for content in [*cuts, *flips, b"{}"]:
        place.write_bytes(content)
        assert TarShards(shards / "000.tar").names == names
    assert len(walks) > len(cuts)
    assert not list(shards.glob(".index-*"))


def test_where_the_folder_cannot_be_written_the_index_is_kept_in_the_users_cache(
    shards, walks, own_caches
):
    cached(shards / "000.tar").mkdir()  # stands in the way, for root too
    assert TarShards(shards / "000.tar").names == TarShards(shards / "000.tar").names
    assert walks == ["000.tar"] and len(list((own_caches / "latentvae" / "tar").iterdir())) == 1
    assert not list(shards.glob(".index-*"))
    shutil.rmtree(own_caches / "latentvae")
    own_caches.mkdir(exist_ok=True)
    (own_caches / "latentvae").write_bytes(b"")  # nor there: it works without
    assert len(TarShards(shards / "000.tar")) == 4


def test_many_may_index_at_once(shards):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: TarShards(shards).names, range(24)))
    assert all(names == found[0] for names in found)
    assert sorted(path.name for path in shards.glob(".*")) == [
        f".{number:03d}.tar.index.npz" for number in range(3)
    ]


def test_a_name_in_two_shards_is_two_images_and_twice_in_one_is_the_last(tmp_path, make_tar, files):
    one, two, three, *_ = files.values()
    make_tar(tmp_path / "s" / "0.tar", {"x.png": one, "y.png": one})
    make_tar(tmp_path / "s" / "1.tar", {"x.png": two})
    with tarfile.open(tmp_path / "s" / "1.tar", "a") as writer:
        for name, data in (("z.png", one), ("z.png", three)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            writer.addfile(member, io.BytesIO(data))
    source = TarShards(tmp_path / "s")
    assert source.names == ["0.tar/x.png", "1.tar/x.png", "y.png", "z.png"]
    sizes = [source.read(index).size for index in range(4)]
    expected = [one, two, one, three]
    assert sizes == [read_image(data).size for data in expected] and len(set(sizes)) == 3


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names(tmp_path, make_tar, files, kind):
    data = next(iter(files.values()))
    names = ["d/" * 150 + "x.png", "ä" * 120 + ".png", "\udcff.png", "1.left.png", "1.right.png"]
    source = TarShards(make_tar(tmp_path / "odd.tar", dict.fromkeys(names, data), kind=kind))
    assert source.names == sorted(names) == TarShards(tmp_path / "odd.tar").names
    assert len({source.read(index).tobytes() for index in range(5)}) == 1


def test_members_that_would_be_paths_or_are_no_files(tmp_path, make_tar, files):
    data = next(iter(files.values()))
    inside = ["../../etc/x.png", "/abs/y.png", "./z.png", "._z.png", ".hidden/w.png"]
    path = make_tar(tmp_path / "hostile.tar", dict.fromkeys(inside, data))
    with tarfile.open(path, "a") as writer:
        for number, kind in enumerate(
            [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
        ):
            member = tarfile.TarInfo(f"link{number}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            writer.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    source = TarShards(path)
    assert source.names == ["abs/y.png", "etc/x.png", "z.png"]
    assert all(source.read(index).size for index in range(3))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, cached(path)])


@pytest.mark.parametrize(
    ("end", "left"),
    [
        (3 * 512 + 20, 1),  # within the second image
        (2 * 512, 1),  # at the edge of the first
        (2 * 512 + 100, 1),  # within the second header
        (4 * 512, 2),  # before the end mark
    ],
)
def test_of_a_truncated_shard_the_images_before_the_cut_count(
    tmp_path, make_png, make_tar, caplog, end, left
):
    data = make_png((2, 1), 8, 0, b"\0\7\x09")
    names = ["a.png", "b.png"]
    path = make_tar(tmp_path / "cut.tar", dict.fromkeys(names, data), kind=tarfile.USTAR_FORMAT)
    path.write_bytes(path.read_bytes()[:end])
    for _ in range(2):  # walked, and from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = TarShards(path)
        assert source.names == names[:left]
        assert len(caplog.records) == 1 and "cut.tar' is damaged or cut off" in caplog.text
        assert source.read(left - 1).size == (2, 1)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, make_tar, files, caplog):
    path = make_tar(tmp_path / "x.tar", dict(list(files.items())[:3]), kind=tarfile.USTAR_FORMAT)
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    content = bytearray(path.read_bytes())
    content[second + 10] ^= 255
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert TarShards(path).names == [next(iter(files))]
    assert "Its 1 images before the damage are used" in caplog.text


def test_a_whole_shard_is_not_warned_about(shards, caplog):
    with caplog.at_level(logging.WARNING):
        TarShards(shards)
    assert not caplog.records


def test_what_has_no_images_is_refused_in_one_sentence(tmp_path, make_tar):
    make_tar(tmp_path / "empty.tar", {})
    make_tar(tmp_path / "labels.tar", {"1.cls": b"3", "2.txt": b"cat"})
    (tmp_path / "text.tar").write_text("not a tar file\n" * 100)
    (tmp_path / "nothing.tar").write_bytes(b"")
    for name, fault in (("empty", ""), ("labels", ""), ("text", "invalid"), ("nothing", "empty")):
        with pytest.raises(UserError, match=f"no images in the 1 tar file.*{name}.tar'.*{fault}"):
            TarShards(tmp_path / f"{name}.tar")
    with pytest.raises(UserError, match="no images in the 4 tar file"):
        TarShards(tmp_path)


def test_a_bad_shard_among_good_ones_is_a_warning(shards, caplog):
    (shards / "003.tar").write_text("<html>")
    with caplog.at_level(logging.WARNING):
        assert len(TarShards(shards)) == 12
    assert len(caplog.records) == 1 and "003.tar" in caplog.text


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_compressed_shards_are_to_be_decompressed(tmp_path, shards, name):
    (tmp_path / name).write_bytes(gzip.compress((shards / "000.tar").read_bytes()))
    with pytest.raises(UserError, match=rf"{name}' is compressed.* Decompress it to a plain \.tar"):
        TarShards(tmp_path / name)


def test_patterns(shards, tmp_path, monkeypatch):
    every = TarShards(shards).names
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern in (
        "shards/{000..002}.tar",
        "shards/*.tar",
        "~/shards/00[0-2].tar",
        "shards/{000,00{1..2}}.tar",
        str(tmp_path),
    ):
        assert TarShards(pattern).names == every
    assert len(TarShards("shards/{001..002}.tar")) == 8
    with pytest.raises(UserError, match=r"no tar file 'shards/003.tar'; did you mean '00.\.tar'"):
        TarShards("shards/{000..003}.tar")
    with pytest.raises(UserError, match="no tar file 'shards/x-"):
        TarShards("shards/x-*.tar")
    with pytest.raises(UserError, match=r"no .tar files in 'empty'"):
        (tmp_path / "empty").mkdir()
        TarShards("empty")


def test_a_broken_image_and_a_vanished_shard_are_unreadable_images(tmp_path, make_tar):
    source = TarShards(make_tar(tmp_path / "x.tar", {"a.png": b"<html>", "b.jpg": b""}))
    for index, reason in ((0, "not an image of a known format"), (1, "the file is empty")):
        with pytest.raises(UnreadableImage) as caught:
            source.read(index)
        assert (caught.value.name, caught.value.reason) == (source.name(index), reason)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(UnreadableImage, match=r"cannot read image 'a.png': No such file"):
        source.read(0)


def test_pattern_characters_in_a_folder_mean_themselves(tmp_path, make_tar, make_picture):
    for name in ("run [1]", "run 1", "{a,b}", "a"):
        file = io.BytesIO()
        make_picture(8, 8).save(file, "PNG")
        for shard in ("000", "001"):
            make_tar(tmp_path / name / f"{shard}.tar", {f"{name}-{shard}.png": file.getvalue()})
    for name in ("run [1]", "{a,b}"):
        for pattern in ("*.tar", "{000..001}.tar", "00[01].tar"):
            found = TarShards(tmp_path / name / pattern).names
            assert found == [f"{name}-000.png", f"{name}-001.png"]
        assert TarShards(tmp_path / name / "001.tar").names == [f"{name}-001.png"]
    make_tar(tmp_path / "a" / "00*.tar", {"own.png": b"x"})
    assert TarShards(tmp_path / "a" / "00*.tar").names == ["own.png"]
