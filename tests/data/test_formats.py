"""Types that need a plugin are named with what reads them, and installed plugins are used."""

import sys
import types

import pytest
from PIL import Image

from latentvae.data import ImageFolder, TarShards, formats, read_image
from latentvae.errors import UserError


@pytest.fixture
def fresh():
    """Forgets which plugins were found, before and after."""
    cached = (formats.installed_plugins, formats.readable_suffixes, formats.known_formats)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def phone(tmp_path, make_picture):
    """Three pictures, nine HEIC and three JXL."""
    folder = tmp_path / "phone"
    folder.mkdir()
    for i in range(3):
        make_picture(8, 8, seed=i).save(folder / f"{i}.png")
        (folder / f"{i}.jxl").write_bytes(b"\xff\x0a")
    for i in range(9):
        (folder / f"{i}.HEIC").write_bytes(b"heic")
    (folder / "raw.CR2").write_bytes(b"x")
    return folder


def test_types_that_are_not_read_are_counted_with_what_reads_them(phone, caplog):
    if formats.installed_plugins():
        pytest.skip("a plugin that reads these types is installed")
    assert len(ImageFolder(phone)) == 3
    (line,) = caplog.messages
    assert "3 images are used. Not used: 9 .heic, 3 .jxl, 1 .cr2. " in line
    assert "To read .heic, .jxl: pip install 'latentvae[heif,jxl]'. Convert .cr2 to" in line


def test_a_folder_of_other_types_alone_says_how_to_read_them(tmp_path, monkeypatch):
    if formats.installed_plugins():
        pytest.skip("a plugin that reads these types is installed")
    (tmp_path / "1.jxl").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images in .*1 \.jxl.*latentvae\[jxl\]"):
        ImageFolder(tmp_path)


def test_an_installed_plugin_is_used(phone, fresh, monkeypatch, make_tar, caplog):
    """A plugin in the place of `pillow_heif` registers a format, which is read from then on."""
    shard = make_tar(phone.parent / "x.tar", {f.name: f.read_bytes() for f in phone.iterdir()})
    assert len(TarShards(shard)) == 3  # and its index is kept
    for function in (formats.installed_plugins, formats.readable_suffixes, formats.known_formats):
        function.cache_clear()

    class HeifFile(Image.Image):
        def __init__(self, file, name):
            super().__init__()
            self._mode, self._size = "RGB", (4, 4)
            self.im = Image.core.fill("RGB", (4, 4), (1, 2, 3))
            self.format, self.readonly = "HEIF", 0

    def register() -> None:
        Image.register_open("HEIF", HeifFile, lambda start: start.startswith(b"heic"))

    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = register
    plugin.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    folder, tar = ImageFolder(phone), TarShards(shard)
    assert len(folder) == len(tar) == 12
    assert read_image(phone / "0.HEIC").getpixel((0, 0)) == (1, 2, 3)
    assert tar.read(tar.names.index("0.HEIC")).getpixel((0, 0)) == (1, 2, 3)
