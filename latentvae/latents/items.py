"""Read the items that `encode` encodes: images in sorted order, and their labels.

`data_sha256` returns a hash of the images' names, labels and captions.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from latentvae.data import (
    DatasetSpec,
    EvalTransform,
    HubImages,
    ImageFolder,
    ImageSource,
    PixelFormat,
    TarShards,
    UnreadableImage,
    open_source,
)
from latentvae.data.split import Subset
from latentvae.errors import UserError

UNLABELLED_FOLDER = "unlabelled"  # images in it have no class, for trainings with few labels


@dataclass(frozen=True)
class Labels:
    """The class number of each item, and the names of classes 0, 1, 2, ... if they have names."""

    values: list[int]
    class_names: list[str] | None


class SomeItems(Subset):
    """Some images of a source, with the name that the user gave to the data.

    Args:
        source, indices: see `Subset`.
        given: how the user named the data, for the manifest.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int], given: str) -> None:
        super().__init__(source, indices)
        self.given = given


class Picture(NamedTuple):
    """An image to encode, (C, H, W), and its (height, width) before the transform.

    `image` is None if the image could not be read. `reason` says why an image could not be read,
    and is empty for other images.
    """

    number: int
    name: str
    image: Tensor | None
    size: tuple[int, int]
    reason: str


class Pictures(Dataset[Picture]):
    """A data set that reads and transforms the images of a source, by number.

    For an image that cannot be read, `Picture.reason` says why. With `flip`, images are mirrored
    left to right.
    """

    def __init__(
        self, source: ImageSource, transform: EvalTransform, *, flip: bool = False
    ) -> None:
        self.source = source
        self.transform = transform
        self.flip = flip

    def __getitem__(self, index: int) -> Picture:
        name = self.source.name(index)
        try:
            image = self.source.read(index)
        except UnreadableImage as error:
            return Picture(index, name, None, (0, 0), error.reason)
        width, height = image.size
        pixels = self.transform(image)
        pixels = pixels.flip(2) if self.flip else pixels
        return Picture(index, name, pixels, (height, width), "")


def open_items(
    data: str | os.PathLike[str] | DatasetSpec | SomeItems, *, pixels: PixelFormat
) -> ImageSource:
    """Open the images of `data`: an argument of `open_source`, or `owner/name` on the Hub.

    `owner/name` is a local path if there is a folder `owner`. The training split of a table or of
    the sample photos is opened, unless a `DatasetSpec` names another split.
    """
    if isinstance(data, SomeItems):
        return data
    if isinstance(data, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", data):
        if not Path(data).exists() and not Path(data).parent.exists():
            return open_source(DatasetSpec(name=data), pixels=pixels)
    return open_source(data, split="train", pixels=pixels)


def given_name(data: str | os.PathLike[str] | DatasetSpec | SomeItems) -> str:
    """Return the name by which the user gave the data, for the manifest."""
    if isinstance(data, SomeItems):
        return data.given
    return data.name if isinstance(data, DatasetSpec) else os.fspath(data)


def find_labels(source: ImageSource, *, label_column: str | None) -> Labels | None:
    """Return the class of each image: a table's label, or the first folder in the image's name.

    Return None if there are no labels: the column is missing, an image is in no folder, or there
    are fewer than two folders.

    Raises:
        UserError: `label_column` does not exist or holds no classes, or is given although `source`
            is not a table.
    """
    if isinstance(source, Subset):
        labels = find_labels(source.source, label_column=label_column)
        if labels is None:
            return None
        return Labels([labels.values[number] for number in source.indices], labels.class_names)
    if isinstance(source, HubImages):
        found = source.labels(label_column)
        return None if found is None else Labels(*found)
    if label_column is not None:
        raise UserError(
            f"label_column '{label_column}' needs a table, but the data is not a table. Leave the "
            "option out: in folders and tar files, the first-level folder of an image is its class."
        )
    if not isinstance(source, ImageFolder | TarShards):
        return None

    # classes from the first folders
    folders = [name.partition("/")[0] if "/" in name else None for name in source.names]
    named = [folder for folder in folders if folder is not None]
    classes = {name: number for number, name in enumerate(sorted(set(named)))}
    if len(named) < len(folders) or len(classes) < 2:
        return None
    return Labels([classes[name] for name in named], list(classes))


def data_sha256(
    source: ImageSource, labels: Labels | None, captions: Sequence[str] | None = None
) -> str:
    """Return the sha256 of all images' names, labels and captions, in the order of the images."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        label = "" if labels is None else str(labels.values[index])
        digest.update(f"{source.name(index)}\0{label}\0".encode(errors="surrogateescape"))
        if captions is not None:
            digest.update(f"{captions[index]}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
