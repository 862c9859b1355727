"""An image source that reads a folder of files.

``tar.py`` reads tar files. ``hub_datasets.py`` reads tables (parquet, arrow, the Hub).
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from latentvae.data.formats import how_to_read, readable_suffixes
from latentvae.data.left_out import (
    count_left_out,
    describe,
    say_left_out,
    side_cars,
    suffix,
)
from latentvae.data.pages import find_pages, page_name
from latentvae.data.pixels import Picture, PixelFormat
from latentvae.data.reading import UnreadableImage, read_image
from latentvae.data.sample_photos import SAMPLES
from latentvae.data.sizes import read_size
from latentvae.errors import UserError, nearest


class ImageSource(Protocol):
    """A source of images, which are read by their number in the source.

    ``read`` raises UnreadableImage for a damaged file. The argument ``at_least`` of ``read`` means
    the same as in ``read_image``. ``size`` returns the width and height of the upright image,
    without decoding the image.
    """

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str: ...

    def read(self, index: int, /, *, at_least: int | None = None) -> Picture: ...

    def size(self, index: int, /) -> tuple[int, int]: ...


class ImageFolder:
    """An image source that reads the image files below a folder, sorted by relative path.

    Hidden files and folders are left out. ``.npy`` files that belong to an image, such as masks,
    are left out too (see ``side_cars``). Links are followed. A folder that is reached by several
    paths is used only once.

    Args:
        root: the folder (``~`` allowed).
        pixels: the format of every image. None means 8-bit RGB.

    Example:
        folder = ImageFolder("photos")
        folder.name(0), folder.read(0).size  # ("2021/a.jpg", (4032, 3024))
    """

    def __init__(self, root: str | os.PathLike[str], *, pixels: PixelFormat | None = None) -> None:
        self.root = Path(root).expanduser()
        self.pixels = pixels
        files = _image_names(self.root)
        places = find_pages(
            files,
            lambda i: open(self.root / files[i], "rb"),
            all_pages=pixels is not None and pixels.all_pages,
            place=str(root),
        )
        named = [
            (files[i] if p is None else page_name(files[i], p), files[i], p) for i, p in places
        ]
        named.sort()
        self.names = [name for name, _, _ in named]
        self._places = [(file, page or 0) for _, file, page in named]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int, /) -> str:
        """Return the path relative to the folder, with ``/`` on every system."""
        return self.names[index]

    def file(self, index: int, /) -> Path:
        """Return the file that contains an image or a page."""
        return self.root / self._places[index][0]

    def read(self, index: int, /, *, at_least: int | None = None) -> Picture:
        page = self._places[index][1]
        return read_image(self.file(index), at_least=at_least, pixels=self.pixels, page=page)

    def size(self, index: int, /) -> tuple[int, int]:
        return read_size(self.file(index), name=self.names[index], page=self._places[index][1])


def inner_name(name: str) -> str:
    """Return the name of an image in a tar file or table as a relative path.

    A leading ``/`` and all parts ``.`` and ``..`` of the path are dropped.
    """
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def is_hidden(name: str) -> bool:
    """Return whether a part of a relative path starts with a dot, as in ``._`` files of macOS."""
    return any(part.startswith(".") for part in name.split("/"))


def read_named(
    name: str,
    data: bytes,
    *,
    at_least: int | None = None,
    pixels: PixelFormat | None = None,
    page: int = 0,
) -> Picture:
    """Read an image from the bytes of a file. An error contains `name` as the file's name."""
    try:
        return read_image(data, at_least=at_least, pixels=pixels, page=page)
    except UnreadableImage as error:
        raise UnreadableImage(name, error.reason) from error


def _image_names(root: Path) -> list[str]:
    _check_folder(root)
    try:
        files = list(walk(root))
    except OSError as error:
        raise UserError(f"cannot list '{error.filename}': {error.strerror}") from error

    # images, and other files
    everything = [str(file) for file in files]
    found = [name for name in everything if suffix(name) in readable_suffixes()]
    images = set(found) - side_cars(found)
    counts = count_left_out(images, (name for name in everything if name not in images))
    names = sorted(images)
    if not names:
        hint = f" The files there are: {describe(counts)}. {how_to_read(counts)}" if counts else ""
        types = ", ".join(readable_suffixes())
        raise UserError(
            f"no images in '{root}' or in subfolders. These types are read: {types}.{hint}".rstrip()
        )
    say_left_out(str(root), num_images=len(names), counts=counts)
    return names


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise UserError(f"'{root}' is a file. Give a folder of images.")
    parent = root.absolute().parent
    siblings = (
        [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    )
    near = nearest(root.name, siblings) or f". Give a folder of images or '{SAMPLES}'."
    raise UserError(f"there is no folder '{root}'{near}")


def walk(root: Path) -> Iterator[PurePosixPath]:
    """Yield the files below a folder, as paths relative to it.

    Hidden files are left out and links are followed. A folder that is reached by several paths is
    searched only once.
    """
    return _walk(root, PurePosixPath(), seen=set())


def _walk(root: Path, below: PurePosixPath, *, seen: set[str]) -> Iterator[PurePosixPath]:
    folder = os.path.realpath(root / below)
    if folder in seen:
        return
    seen.add(folder)
    with os.scandir(root / below) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in visible:
        if os.path.isdir(entry.path):  # works for a link to itself too, unlike entry.is_dir()
            yield from _walk(root, below / entry.name, seen=seen)
        else:  # dead links and pipes too, which are reported when they are read
            yield below / entry.name
