"""Read folders of latents or tokens as one table in memory, and hold out validation images.

Symbols: `n` images.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from latentvae.data import spread
from latentvae.data.split import held_out
from latentvae.errors import UserError
from latentvae.latents.captions import whole_text
from latentvae.latents.shard_dataset import LatentDataset, ShardReader, TokenDataset
from latentvae.priors.transformer import NO_CLASS

Table = TypeVar("Table", bound="ItemTable")
Data = TypeVar("Data")
Folder = TypeVar("Folder", TokenDataset, LatentDataset)


@dataclass(frozen=True)
class ItemTable:
    """The latents or tokens of images, in memory, with classes, names and captions.

    A subclass adds the latents or tokens as tensors (n, ...). An optional tensor may be None.

    Attributes:
        classes: (n,), int64, `NO_CLASS` for an image without a class.
        names: name of each image.
        captions: caption of each image, "" for an image without a caption.
    """

    classes: Tensor
    names: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def some(self, numbers: Sequence[int]) -> Self:
        """Return a table with only the images with these indices."""
        chosen = torch.as_tensor(numbers, dtype=torch.int64)

        def part(values: Any) -> Any:
            if isinstance(values, list):
                return [values[number] for number in numbers]
            return None if values is None else values[chosen]

        parts = {f.name: part(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return type(self)(**parts)

    def split(self, *, share: float, seed: int) -> tuple[Self, Self]:
        """Return a training table and a table of held-out images, chosen by hashes of the names."""
        chosen = held_out(self.names, share=share, seed=seed)
        train, held = ([i for i, h in enumerate(chosen) if h is part] for part in (False, True))
        return self.some(train), self.some(held)

    def at_most(self, count: int) -> Self:
        """Return a table of at most `count` images, evenly spread over this table."""
        return self.some(spread(len(self), count))

    def captioned(self, captions: Mapping[str, str]) -> Self:
        """Return the table with new captions. `captions` maps names of images to captions."""
        return replace(self, captions=[captions[name] for name in self.names])

    def captions_hash(self) -> str:
        """Return a hash of all captions. A resumed run compares this hash with the checkpoint's."""
        texts = "\0".join(self.captions).encode(errors="surrogateescape")
        return hashlib.sha256(texts).hexdigest()[:16]


def annotations(readers: Sequence[ShardReader]) -> dict[str, Any]:
    """Return the classes, names and captions of all images, as fields of an `ItemTable`."""
    classes, names, captions = [], list[str](), list[str]()
    for reader in readers:
        none = torch.full((len(reader),), NO_CLASS)
        classes.append(reader.whole("labels") if reader.content.labels else none)
        names += reader.names()
        captions += reader.captions()
    return {"classes": torch.cat(classes), "names": names, "captions": captions}


def open_split(
    kind: type[Folder],
    joined: Callable[[Sequence[Folder]], Table],
    same: Mapping[str, str],
    *,
    option: str,
    folders: Sequence[str],
    validation: str | None,
    share: float,
    at_most: int,
    seed: int,
) -> tuple[Folder, Table, Table]:
    """Read folders of latents or tokens (items), and choose items for validation.

    Args:
        kind: class that opens a folder.
        joined: function that returns the items of several folders as one table.
        same: fields of `Content` that must be equal in all folders, mapped to their names in error
            messages.
        option: name of the option that lists the folders (tokens or latents), for error messages.
        folders: folders to train on.
        validation: folder to validate on. None holds out a share of the images.
        share: share of the images that is held out.
        at_most: largest number of images in a validation.
        seed: decides which images are held out.

    Returns:
        The first folder, the items to train on, and the items to validate on.

    Raises:
        UserError: `folders` is empty, a folder does not hold latents or tokens, or is damaged, two
            folders differ in a field of `same`, or `validation` has the same images as one of
            `folders`.
    """
    if not folders:
        raise UserError(
            f"{option} is missing. Give a folder that `latentvae encode` wrote, such as "
            f"--{option} {option}/train."
        )
    first, *others = [kind(folder) for folder in folders]
    for other in others:
        check_alike(first, other, same)
    train = joined([first, *others])
    if validation is None:
        train, held = train.split(share=share, seed=seed)
        return first, train, held.at_most(at_most)

    unseen = kind(validation)
    check_alike(first, unseen, same)
    for folder in (first, *others):
        if folder.content.data_sha256 == unseen.content.data_sha256:
            raise UserError(
                f"validation_{option} '{validation}' has the same images as {option} "
                f"'{folder.reader.folder}'. Give {option} of unseen images, or leave "
                f"validation_{option} out."
            )
    return first, train, joined([unseen]).at_most(at_most)


def check_alike(first: Folder, other: Folder, same: Mapping[str, str]) -> None:
    """Raise UserError unless the fields of `same`, such as the model, are equal in two folders."""
    for name, words in same.items():
        ours, theirs = getattr(first.content, name), getattr(other.content, name)
        if ours != theirs:
            shown = name in ("num_codes", "item_shape", "moments")  # hashes and names say little
            values = f" ({theirs}, not {ours})" if shown else ""
            raise UserError(
                f"'{other.reader.folder}' has other {words} than '{first.reader.folder}'{values}. "
                "Encode the images of both folders with the same model, resolution and classes."
            )


def read_captions(path: str, names: Sequence[str]) -> dict[str, str]:
    """Return the captions of images by name, from a JSON Lines file of {"id": ..., "text": ...}.

    Raises:
        UserError: the file cannot be read, a line has another form, or an image has no line.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"captions '{path}' cannot be read: {error}") from error

    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["id"], row["text"]
        except (ValueError, TypeError, KeyError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(
                f'captions \'{path}\', line {number}: expected {{"id": ..., "text": ...}} with two '
                f"strings, not {line[:80]!r}"
            )
        found[name] = whole_text(text).strip()

    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"the captions file '{path}' has no text for {len(missing):,} of {len(names):,} "
            f"images. The first such image is '{missing[0]}'."
        )
    return {name: found[name] for name in names}


def with_captions(data: Data, path: str) -> Data:
    """Return the data with its captions replaced by the captions of a file (`read_captions`).

    Args:
        data: a dataclass whose fields `train` and `validation` are tables.
        path: the file.
    """
    given: Any = data
    captions = read_captions(path, [*given.train.names, *given.validation.names])
    tables = given.train.captioned(captions), given.validation.captioned(captions)
    return replace(given, train=tables[0], validation=tables[1])


def check_captions(train: ItemTable, validation: ItemTable, *, option: str, instead: str) -> None:
    """Raise UserError unless every image has a caption.

    Args:
        train: images to train on.
        validation: images to validate on.
        option: name of the option that lists the folders (tokens or latents), for error messages.
        instead: advice for error messages: how to train without captions.
    """
    tables = (train, validation)
    named = [pair for t in tables for pair in zip(t.names, t.captions, strict=True)]
    missing = [name for name, caption in named if not caption]
    if len(missing) == len(named):
        raise UserError(
            f"condition text needs captions, but the {option} have none. Give --captions FILE, or "
            "encode images that have captions (.txt files beside the images, or a table column)."
        )
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(named):,} images have no caption. The first is "
            f"'{missing[0]}'. Give every image a caption and encode again, or give --captions FILE "
            f"with a text for every image, or {instead}."
        )
