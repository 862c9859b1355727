"""Find the captions of images: text files beside them, or a column of a table.

| data | captions |
|---|---|
| folder | `cats/001.txt` beside `cats/001.jpg`, else `metadata.jsonl` of `datasets`' imagefolder |
| tar files | the member `cats/001.txt` beside `cats/001.jpg`, as in webdataset and img2dataset |
| table | a column of strings: `text` or `caption`, or the column that the user names |
"""

import json
from pathlib import Path

from latentvae.data import HubImages, ImageFolder, ImageSource, TarShards
from latentvae.data.image_folder import walk
from latentvae.data.left_out import stem, suffix
from latentvae.data.tar_index import texts_in
from latentvae.errors import UserError
from latentvae.files import read_text
from latentvae.latents.items import SomeItems

METADATA = "metadata.jsonl"
COLUMNS = ("text", "caption")  # of a table, and of a line in `METADATA`
MAX_BYTES = 1 << 16  # largest size of a text file. The rest is cut


def find_captions(source: ImageSource, *, caption_column: str | None = None) -> list[str] | None:
    """Return each image's caption ("" if it is missing), or None if all captions are missing.

    The option `caption_column` names a column of a table. None means the column `text` or
    `caption`.

    Raises:
        UserError: `caption_column` does not exist or holds no texts, or is given although `source`
            is not a table. The error also occurs if the file of a caption cannot be read, or if
            `metadata.jsonl` does not have the form that imagefolder reads.
    """
    if isinstance(source, SomeItems):
        whole = find_captions(source.source, caption_column=caption_column)
        return None if whole is None else [whole[number] for number in source.indices]
    if isinstance(source, HubImages):
        texts = source.texts(caption_column, default=COLUMNS)
        return texts if texts and any(texts) else None
    if caption_column is not None:
        raise UserError(
            f"caption_column '{caption_column}' needs a table, but the data is not a table. Leave "
            "the option out: captions of folders and tar files are .txt files beside the images."
        )
    captions = _beside(source)
    return captions if any(captions) else None


def _beside(source: ImageSource) -> list[str]:
    """Return the texts beside the images of a folder or of tar files, and [] for other sources."""
    if isinstance(source, ImageFolder):
        return _in_folder(source)
    if isinstance(source, TarShards):
        texts = {path: texts_in(path, largest=MAX_BYTES) for path in source.shards}
        places = ((source.shard(i), stem(name)) for i, name in enumerate(source.members))
        return [texts[path].get(name, "") for path, name in places]
    return []


def _in_folder(source: ImageFolder) -> list[str]:
    names = [source.file(i).relative_to(source.root).as_posix() for i in range(len(source))]
    found = {str(path) for path in walk(source.root) if suffix(str(path)) == ".txt"}
    files = {stem(name): source.root / name for name in sorted(found)}
    if any(stem(name) in files for name in names):
        texts = {name: _read(path) for name, path in files.items() if path.is_file()}
        return [texts.get(stem(name), "") for name in names]
    table = _metadata(source.root / METADATA)
    return [table.get(name, "") for name in names]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return clean(file.read(MAX_BYTES))
    except OSError as error:
        raise UserError(f"caption '{path}' cannot be read: {error.strerror or error}") from error


def clean(data: bytes) -> str:
    """Return bytes as text without white space at both ends.

    Bytes that are not UTF-8 are replaced by U+FFFD.
    """
    return data.decode(errors="replace").strip()


def whole_text(text: str) -> str:
    """Return a text without halves of surrogate pairs, which cannot be written as UTF-8."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _metadata(path: Path) -> dict[str, str]:
    """Return the captions in a `metadata.jsonl` by the image's path, or {} if it does not exist."""
    found: dict[str, str] = {}
    if not path.is_file():
        return found
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["file_name"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"'{path}', line {number}: expected a JSON object with the key file_name, not "
                f"{line[:80]!r}."
            ) from error
        texts = [row[column] for column in COLUMNS if isinstance(row.get(column), str)]
        if texts and isinstance(name, str):
            found[name] = whole_text(texts[0]).strip()
    return found
