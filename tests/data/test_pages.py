"""Pages of TIFF files: the first is used and the rest are said, or all are images of their own."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from latentvae.data import ImageFolder, PixelFormat, TarShards, open_images, read_image
from latentvae.data.pages import file_of_page
from latentvae.data.pixels import EIGHT_BIT
from latentvae.data.sizes import read_size

ALL = PixelFormat(1, all_pages=True)


def stack(values: list[np.ndarray]) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in values:
            writer.write(page, photometric="rgb" if page.ndim == 3 else "minisblack")
    return file.getvalue()


PAGES = [np.full((4 + i, 6), 10 * i, np.uint8) for i in range(5)]
DEEP = [np.full((4, 6, 3), 1000 * i, np.uint16) for i in range(3)]


@pytest.fixture(params=["folder", "tar"])
def opened(request, tmp_path: Path, make_tar):
    """A source with a stack of five grey pages, one of three deep pages, and two plain files."""
    plain = io.BytesIO()
    Image.fromarray(PAGES[1]).save(plain, "TIFF")
    files = {"a.tif": plain.getvalue(), "deep.TIFF": stack(DEEP), "stack.tif": stack(PAGES)}
    files["bad.tif"] = b"II*\0"

    def build(pixels: PixelFormat | None):
        if request.param == "tar":
            return TarShards(make_tar(tmp_path / "x.tar", files), pixels=pixels)
        for name, data in files.items():
            (tmp_path / "folder").mkdir(exist_ok=True)
            (tmp_path / "folder" / name).write_bytes(data)
        return ImageFolder(tmp_path / "folder", pixels=pixels)

    return build


def test_the_first_page_is_used_and_said_in_one_line(opened, caplog):
    source = opened(PixelFormat(1))
    assert source.names == ["a.tif", "bad.tif", "deep.TIFF", "stack.tif"]
    (line,) = caplog.messages
    assert "2 TIFF files have several pages, such as 'deep.TIFF' with 3. Only their first" in line
    assert source.size(3) == (6, 4)


def test_every_page_is_an_image_of_its_own(opened, caplog):
    source = opened(ALL)
    assert not caplog.records and len(source) == 10
    names = [f"deep-page{i:04d}.TIFF" for i in (1, 2, 3)]
    assert source.names[2:] == names + [f"stack-page{i:04d}.tif" for i in range(1, 6)]
    for i in range(5):
        page = source.read(5 + i)
        assert page.size == source.size(5 + i) == (6, 4 + i)
        assert page.getpixel((0, 0)) == 10 * i
    for i in range(3):
        value = (source.read(2 + i).to_array()[0, 0, 0] + 1) / 2 * 65535
        assert value == pytest.approx(1000 * i, abs=0.01)


def test_pages_also_for_pictures_of_8_bits():
    data = stack(DEEP)
    for i in range(3):
        expected = (round(1000 * i / 257),) * 3
        found = read_image(data, pixels=EIGHT_BIT, page=i).getpixel((0, 0))
        assert np.abs(np.subtract(found, expected)).max() <= 1
    assert read_size(data, name="x", page=2) == (6, 4)


def test_smaller_versions_of_a_page_are_no_pages(tmp_path: Path, caplog):
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:
        writer.write(np.zeros((32, 32), np.uint8))
        writer.write(np.zeros((16, 16), np.uint8), subfiletype=1)
    assert ImageFolder(tmp_path, pixels=ALL).names == ["pyramid.tif"]
    ImageFolder(tmp_path)
    assert not caplog.records


def test_the_pages_of_a_file_are_held_out_together(tmp_path: Path):
    for name in "abcdef":
        (tmp_path / f"{name}.tif").write_bytes(stack(PAGES[:3]))
    train, validation = open_images(tmp_path, split_share=0.4, pixels=ALL)
    of_train = {file_of_page(train.name(i)) for i in range(len(train))}
    held_out = {file_of_page(validation.name(i)) for i in range(len(validation))}
    assert len(train) + len(validation) == 18
    assert held_out and not of_train & held_out
    for name in "bcdef":
        (tmp_path / f"{name}.tif").unlink()
    train, validation = open_images(tmp_path, split_share=0.4, pixels=ALL)
    assert len(train) + len(validation) == 3 and len(validation)
