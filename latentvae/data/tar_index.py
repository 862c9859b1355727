"""Find the images in a tar file in one pass over its headers, and cache the result.

Only headers are read and nothing is unpacked, so no member's name is used as a path on disk. The
index is kept beside the tar file (``.000000.tar.index.npz``) or, if that folder cannot be written,
in ``$XDG_CACHE_HOME/latentvae/tar`` (by default ``~/.cache/latentvae/tar``). The index is valid
while the tar file's size and modification time and the readable file types stay the same.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

import numpy as np

from latentvae.data.formats import readable_suffixes
from latentvae.data.image_folder import inner_name, is_hidden
from latentvae.data.left_out import count_left_out, side_cars, stem, suffix
from latentvae.errors import UserError, first_line

VERSION = 3  # version of the cached index
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class ShardIndex:
    """A list of the images in one tar file, with the position of each image.

    Attributes:
        names: names of the images as relative paths, see `inner_name`, (N,). If several members
            have the same name, the last member is used, as when the tar file is unpacked.
        offsets: number of bytes from the start of the file to each image's first byte, (N,), int64.
        sizes: sizes of the images in bytes, (N,), int64.
        fault: what is wrong with the tar file, or "".
        left_out: for each kind of file, such as ``.csv``, the number of members that are not used.
    """

    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    fault: str = ""
    left_out: Counter[str] = field(default_factory=Counter)


def shard_index(path: Path) -> ShardIndex:
    """Return the images of a tar file, from the cache if the cached index is valid.

    Raises:
        UserError: the file cannot be opened, or it is compressed.
    """
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):  # opening a pipe would hang
            raise UserError(f"'{path}' is not a regular file. Give a tar file.")

        # from the cache
        types = zlib.crc32(" ".join(readable_suffixes()).encode())
        key = [VERSION, stat.st_size, stat.st_mtime_ns, types]
        places = _cache_places(path)
        for place in places:
            if (found := _load(place, key)) is not None:
                return found
        index = _walk(path, stat.st_size)

    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error

    # keep the index beside the shard, or in the user's cache
    content = _content(index, key)
    for place in places:
        with contextlib.suppress(OSError):  # if this place is read-only or full, try the next place
            _replace(place, content, mode=stat.st_mode & 0o666)
            break
    return index


def texts_in(path: Path, *, largest: int) -> dict[str, str]:
    """Return the content of each text file (.txt) in a tar file, by its name without suffix.

    If the tar file is damaged, the texts before the damage are returned.

    Args:
        path: the tar file.
        largest: largest number of bytes to read of each text.
    """
    found: dict[str, str] = {}
    # Damaged headers raise errors of many types. `shard_index` reports the damage.
    with contextlib.suppress(Exception), tarfile.open(path, "r:") as tar:
        for member in _whole_members(tar, path.stat().st_size):
            name = inner_name(member.name)
            if suffix(name) == ".txt" and not is_hidden(name) and (file := tar.extractfile(member)):
                found[stem(name)] = file.read(largest).decode(errors="replace").strip()
    return found


def _walk(path: Path, size: int) -> ShardIndex:
    members: dict[str, tuple[int, int]] = {}
    fault = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _whole_members(tar, size):
                name = inner_name(member.name)
                if not is_hidden(name):
                    members[name] = (member.offset_data, member.size)
    except OSError:
        raise
    # Besides TarError, damaged extended headers raise ValueError, OverflowError and more.
    except Exception as error:
        fault = _fault(path, error)
    found = [name for name in members if suffix(name) in readable_suffixes()]
    not_images = side_cars(found)
    images = [name for name in found if name not in not_images]
    left_out = count_left_out(images, members.keys() - set(images))
    places = np.array([members[name] for name in images], dtype=np.int64).reshape(-1, 2)
    return ShardIndex(images, places[:, 0], places[:, 1], fault, left_out)


def _whole_members(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the plain files that lie completely within the first ``size`` bytes.

    Links and devices are left out, because they hold no image.

    Raises:
        tarfile.ReadError: the tar file is damaged. The files before the damage are yielded first.
    """
    end = 0
    for member in tar:
        if member.size < 0 or member.offset_data < end:
            raise tarfile.ReadError("a header points backwards")
        if member.isreg() and not member.issparse():
            end = member.offset_data + member.size
            if end > size:
                raise tarfile.ReadError("unexpected end of data")
            yield member
    # tarfile treats a damaged or missing header as the end. The real end is a block of zeros.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it has no end mark")


def _fault(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(6)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"'{path}' is compressed ({kind}), so no image in it can be reached directly. "
                "Decompress it to a plain .tar."
            ) from error
    return first_line(error)


def _cache_places(path: Path) -> list[Path]:
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return [path.with_name(f".{path.name}.index.npz"), user / "latentvae" / "tar" / f"{key}.npz"]


def _content(index: ShardIndex, key: list[int]) -> bytes:
    file = io.BytesIO()
    left_out = json.dumps(index.left_out)
    texts = "\0".join([left_out, index.fault, *index.names]).encode(errors="surrogateescape")
    np.savez(
        file,
        key=np.array(key),
        texts=np.frombuffer(texts, dtype=np.uint8),
        offsets=index.offsets,
        sizes=index.sizes,
    )
    return file.getvalue()


def _load(place: Path, key: list[int]) -> ShardIndex | None:
    """Return the cached index, or None if it is missing, stale or damaged."""
    if not place.is_file():  # opening a pipe would hang
        return None
    try:
        with open(place, "rb") as file, np.load(file, allow_pickle=False) as found:
            # Our index is not compressed. A compressed file could fill the memory.
            if any(entry.file_size > entry.compress_size for entry in found.zip.infolist()):
                return None
            if found["key"].tolist() != key:
                return None
            texts = found["texts"].tobytes().decode(errors="surrogateescape")
            left_out, fault, *names = texts.split("\0")
            counts = Counter(
                {str(kind): int(count) for kind, count in json.loads(left_out).items()}
            )
            offsets, sizes = found["offsets"].astype(np.int64), found["sizes"].astype(np.int64)
    except Exception:  # zip, zlib and NumPy raise their own errors. Then the shard is read again.
        return None

    # every entry must lie inside the shard
    if not offsets.shape == sizes.shape == (len(names),):
        return None
    if any(name != inner_name(name) for name in names):
        return None
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= key[1] - offsets)
    return ShardIndex(names, offsets, sizes, fault, counts) if inside.all() else None


def _replace(place: Path, content: bytes, *, mode: int) -> None:
    """Write a temporary file and rename it, so that no process reads an incomplete file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    file, aside = tempfile.mkstemp(dir=place.parent, prefix=".index-")
    try:
        with open(file, "wb") as writer:
            writer.write(content)
        os.chmod(aside, mode)  # everybody who may read the shard may read its index
        os.replace(aside, place)
    except OSError:
        Path(aside).unlink(missing_ok=True)
        raise
