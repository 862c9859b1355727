"""Images in tar files (webdataset shards), read by byte offset in any order, as from a folder.

https://github.com/webdataset/webdataset. A member is a file in a tar file. Each member that is an
image file is one image. Other members (``.cls``, ``.json``, and a ``.npy`` with the name of an
image) are not read. `tar_index.texts_in` reads the captions (``.txt``).
"""

import glob
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL.ContainerIO import ContainerIO

from latentvae.data.image_folder import is_hidden, read_named
from latentvae.data.left_out import describe, say_left_out
from latentvae.data.pages import find_pages, page_name
from latentvae.data.pixels import Picture, PixelFormat
from latentvae.data.reading import UnreadableImage
from latentvae.data.sizes import read_size
from latentvae.data.tar_index import shard_index
from latentvae.errors import UserError, nearest, printable

MAX_BYTES = 1 << 30  # largest size of an image file, because a sparse shard may claim any size
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

logger = logging.getLogger(__name__)


class TarShards:
    """An image source that reads tar files. The images of all tar files are sorted by name.

    An image has the name of its member (file in the tar file), so the same images have the same
    names and order as in a folder. A name that occurs in several shards gets the shard's name as a
    prefix: ``000001.tar/0007.jpg``. From a damaged or incomplete shard, only the images before the
    damage are used, with a warning.

    Args:
        spec: a .tar file, a folder of .tar files, or a pattern: ``shards/train-{000..012}.tar``,
            ``shards/*.tar`` (``~`` allowed).
        pixels: the format of every image. None means 8-bit RGB.

    Attributes:
        members: name of each image's member in its shard.

    Example:
        shards = TarShards("shards/train-{000..012}.tar")
        shards.name(0), shards.read(0).size  # ("0000000.jpg", (64, 64))
    """

    def __init__(self, spec: str | os.PathLike[str], *, pixels: PixelFormat | None = None) -> None:
        self.pixels = pixels
        self.shards = find_shards(spec)
        found = [shard_index(path) for path in self.shards]

        # damage
        for path, index in zip(self.shards, found, strict=True):
            if index.fault:
                logger.warning(
                    "'%s' is damaged or cut off (%s). Its %d images before the damage are used.",
                    *(printable(str(path)), printable(index.fault), len(index.names)),
                )

        # members that are not used
        left_out = sum((index.left_out for index in found), Counter[str]())
        if not any(index.names for index in found):
            fault = next((f": {index.fault}" for index in found if index.fault), "")
            hint = f". The members are: {describe(left_out)}" if left_out else ""
            raise UserError(f"no images in the {len(found)} tar file(s) of '{spec}'{fault}{hint}")
        num_images = sum(len(index.names) for index in found)
        say_left_out(os.fspath(spec), num_images=num_images, counts=left_out)

        # all members, then their pages, sorted by name
        members = _distinct([index.names for index in found], self.shards)
        counts = [len(index.names) for index in found]
        self._shard_of = np.repeat(np.arange(len(found)), counts)
        self._offsets = np.concatenate([index.offsets for index in found])
        self._sizes = np.concatenate([index.sizes for index in found])
        places = find_pages(
            members,
            self._open,
            all_pages=pixels is not None and pixels.all_pages,
            place=os.fspath(spec),
        )
        named = [(members[i] if p is None else page_name(members[i], p), i, p) for i, p in places]
        named.sort()
        order = [i for _, i, _ in named]
        self.names = [name for name, _, _ in named]
        inside = [name for index in found for name in index.names]
        self.members = [inside[i] for i in order]
        self._pages = [page or 0 for _, _, page in named]
        self._shard_of, self._offsets = self._shard_of[order], self._offsets[order]
        self._sizes = self._sizes[order]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int, /) -> str:
        return self.names[index]

    def shard(self, index: int, /) -> Path:
        """Return the tar file that contains the image."""
        return self.shards[self._shard_of[index]]

    def read(self, index: int, /, *, at_least: int | None = None) -> Picture:
        if self._sizes[index] > MAX_BYTES:
            raise UnreadableImage(self.name(index), f"{self._sizes[index]:,} bytes are too many")
        # Open the shard anew each time, like an image file. So worker processes share no open file,
        # and the number of shards has no limit.
        try:
            with open(self.shard(index), "rb") as file:
                file.seek(self._offsets[index])
                data = file.read(self._sizes[index])
        except OSError as error:
            raise UnreadableImage(self.name(index), error.strerror or str(error)) from error
        page = self._pages[index]
        return read_named(self.name(index), data, at_least=at_least, pixels=self.pixels, page=page)

    def size(self, index: int, /) -> tuple[int, int]:
        try:
            with self._open(index) as member:
                return read_size(member, name=self.name(index), page=self._pages[index])
        except OSError as error:
            raise UnreadableImage(self.name(index), error.strerror or str(error)) from error

    @contextmanager
    def _open(self, index: int) -> Iterator[IO[bytes]]:
        with open(self.shard(index), "rb") as file:
            yield _Member(file, int(self._offsets[index]), int(self._sizes[index]))


class _Member(ContainerIO[bytes]):
    """A member of a tar file as a file object. tifffile needs the attribute `name`."""

    @property
    def name(self) -> str:
        return ""


def find_shards(spec: str | os.PathLike[str]) -> list[Path]:
    """Return the sorted tar files of a path, of a pattern, or of a folder and its subfolders.

    Raises:
        UserError: there is no tar file, a file named in braces is missing, or `spec` is compressed.
    """
    root = Path(spec).expanduser()
    if root.name.lower().endswith(COMPRESSED_SUFFIXES):
        raise UserError(
            f"'{root}' is compressed, so no image in it can be reached directly. "
            "Decompress it to a plain .tar."
        )
    if root.is_dir():
        found = (path for path in root.rglob("*") if path.suffix.lower() == ".tar")
        files = (path for path in found if not path.is_dir())
        shards = [path for path in files if not is_hidden(path.relative_to(root).as_posix())]
    elif root.exists():
        return [root]
    else:
        folder, pattern = _split_pattern(root)
        shards = [path for part in _braces(pattern) for path in _matches(folder, part)]
    if not shards:
        raise UserError(f"there are no .tar files in '{root}'" if root.is_dir() else _missing(root))
    return sorted(set(shards))


def _braces(pattern: str) -> Iterator[str]:
    """Yield the names that ``a{000..002}`` or ``a{x,y}`` stands for, as in a shell."""
    match = re.search(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    for choice in _choices(match[1]):
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _choices(inside: str) -> list[str]:
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = ends.groups()
        return [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return inside.split(",")


def _split_pattern(path: Path) -> tuple[Path, str]:
    """Return the existing folder at the start of a path, and the pattern of names below it.

    So a folder that is named ``run [1]`` or ``{a,b}`` is taken literally.
    """
    known = next((folder for folder in path.parents if folder.is_dir()), Path("."))
    return known, str(path.relative_to(known))


def _matches(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in a folder that match a pattern. A path without wildcards must exist."""
    literal = folder / pattern
    if literal.exists():
        return [literal]
    if not glob.has_magic(pattern):
        raise UserError(_missing(literal))
    return [folder / found for found in glob.glob(pattern, root_dir=folder, recursive=True)]


def _missing(path: Path) -> str:
    parent = path.absolute().parent
    near = nearest(path.name, os.listdir(parent)) if parent.is_dir() else ""
    return f"there is no tar file '{path}'{near}"


def _distinct(names: list[list[str]], shards: list[Path]) -> list[str]:
    """Return all names in one list. A name in several shards gets the shard's name as a prefix."""
    times = Counter(itertools.chain.from_iterable(names))
    root = os.path.commonpath([path.absolute().parent for path in shards])
    result: list[str] = []
    for path, inside in zip(shards, names, strict=True):
        shard = path.absolute().relative_to(root).as_posix()
        result += [name if times[name] == 1 else f"{shard}/{name}" for name in inside]
    return result
