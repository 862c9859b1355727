"""Open images in any form, and choose which are for training and which for validation.

Every source sorts its images by name. Except in tables without paths, the name of an image does not
depend on how the image is stored. The hash of the name decides whether an image is held out for
validation. So the training and the validation images are the same whether the images are stored as
a folder, as tar files or as a table with paths. With the same seed, the batches do not depend on
the form of storage either.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from latentvae.data.formats import readable_suffixes
from latentvae.data.hub_datasets import (
    SAVED,
    TABLE_SUFFIXES,
    DatasetSpec,
    HubImages,
    local_files,
    split_names,
)
from latentvae.data.image_folder import ImageFolder, ImageSource, walk
from latentvae.data.pages import file_of_page
from latentvae.data.pixels import Picture, PixelFormat
from latentvae.data.sample_photos import SAMPLES, SamplePhotos
from latentvae.data.sprites import SPRITES, Sprites
from latentvae.data.tar import COMPRESSED_SUFFIXES, TarShards
from latentvae.errors import UserError

Spec = str | os.PathLike[str] | DatasetSpec
Form = Literal["samples", "sprites", "folder", "tar", "table"]
BUILT_IN: tuple[Form, ...] = (SAMPLES, SPRITES)  # names of images that come with the package


class Subset:
    """An image source that holds only the chosen images of another source.

    Args:
        source: the images.
        indices: the chosen images, in this order.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int, /) -> str:
        return self.source.name(self.indices[index])

    def read(self, index: int, /, *, at_least: int | None = None) -> Picture:
        return self.source.read(self.indices[index], at_least=at_least)

    def size(self, index: int, /) -> tuple[int, int]:
        return self.source.size(self.indices[index])


def spread(total: int, at_most: int | None) -> list[int]:
    """Return up to `at_most` of the numbers below `total`, evenly spaced, starting at 0.

    With None for `at_most`, return all numbers below `total`.
    """
    if at_most is None or at_most >= total:
        return list(range(total))
    if at_most < 1:
        raise UserError(f"the number of images must be at least 1 (got {at_most}).")
    return [i * total // at_most for i in range(at_most)]


def some_of(source: ImageSource, at_most: int) -> Subset:
    """Return up to ``at_most`` images, evenly spread over the source.

    The images are spread, because the first images in the order of names often belong to one class.
    """
    return Subset(source, spread(len(source), at_most))


def open_source(
    spec: Spec, *, split: str = "validation", pixels: PixelFormat | None = None
) -> ImageSource:
    """Open the images that ``spec`` names. The content of a folder decides how it is read.

    A string or path may be ``"samples"`` (``SamplePhotos``) or ``"sprites"`` (``Sprites``). To open
    a folder named ``samples``, pass the string ``"./samples"``. Other strings and paths name a
    folder of images, tar files (``TarShards``) or a table (``HubImages``). Tar files are given as
    one .tar file, a folder of .tar files, or a pattern. A table is given as a .parquet or .arrow
    file, a folder of such files, or a folder written by ``save_to_disk``. Any other folder that
    holds an image is a folder of images, and its .tar and table files are not used. But ``.npy``
    files beside .tar or table files do not count as images.

    A ``DatasetSpec`` can name the same images as a string, and adds options. Any other name in a
    ``DatasetSpec`` is a data set of the Hub. If a ``DatasetSpec`` names a folder of images, the
    folder is read as a table with the splits that ``datasets`` finds in the folder.

    Args:
        spec: the name of the images, or a ``DatasetSpec``.
        split: the split of the sample photos or of a local table. If a table has only one split,
            this split is used, whatever its name is. Folders of images, tar files and the sprites
            have no splits, so all of their images are used. A ``DatasetSpec`` names its split
            itself.
        pixels: the format of every image. None means 8-bit RGB.
    """
    if isinstance(spec, DatasetSpec):
        kind = _kind_with_options(spec)
    else:
        spec = DatasetSpec(name=os.fspath(spec), split=split, any_split=True)
        kind = _kind(spec.name) or "folder"

    if kind == "table" and pixels is not None and pixels.all_pages:
        raise UserError(
            "all_pages reads the pages of TIFF files in folders and tar shards, not in tables. "
            f"Leave all_pages out for '{spec.name}', or give a folder or tar files of TIFFs."
        )
    return SOURCES[kind](spec, pixels)


SOURCES: dict[Form, Callable[[DatasetSpec, PixelFormat | None], ImageSource]] = {
    "samples": lambda spec, pixels: SamplePhotos(spec.split, pixels=pixels),
    "sprites": lambda spec, pixels: Sprites(pixels=pixels),
    "folder": lambda spec, pixels: ImageFolder(spec.name, pixels=pixels),
    "tar": lambda spec, pixels: TarShards(spec.name, pixels=pixels),
    "table": lambda spec, pixels: HubImages(spec, pixels=pixels),
}


def open_images(
    spec: Spec,
    *,
    validation_data_dir: Spec | None = None,
    split_share: float = 0.02,
    seed: int = 0,
    max_train_samples: int | None = None,
    pixels: PixelFormat | None = None,
) -> tuple[ImageSource, ImageSource]:
    """Open the images for training and for validation. No image is used for both purposes.

    Copies of a file are different images, so a copy of a validation image can be in training.

    Args:
        spec: the images, as for ``open_source``. From sample photos and tables, the training split
            is used.
        validation_data_dir: the validation images, in the same forms as ``spec``. An image file or
            tar file that both ``spec`` and ``validation_data_dir`` contain is not used for
            training. If both are tables and share a file, UserError is raised.
        split_share: the fraction of the images of ``spec``, between 0 and 1, that is held out for
            validation if there is no ``validation_data_dir``. The sample photos are an exception,
            because they have a validation split. The hash of an image's name and ``seed`` decides
            whether it is held out. So if you add images, no other image moves between training and
            validation. At least one image is held out, and at least one image is kept for training.
            For this reason, an added image can move another image if there are very few images.
        seed: seed of the hash. Another seed holds out other images.
        max_train_samples: largest number of training images. The images with the smallest hashes of
            name and ``seed`` are used. So a smaller set is a subset of a larger set, and both are
            random samples of all training images.
        pixels: the format of every image. None means 8-bit RGB.
    """
    train = open_source(spec, split="train", pixels=pixels)

    # validation images
    if validation_data_dir is not None:
        validation = open_source(validation_data_dir, split="validation", pixels=pixels)
        train = _without(train, validation)
    elif isinstance(train, SamplePhotos):
        validation = open_source(spec, split="validation", pixels=pixels)
    else:
        by_file = pixels is not None and pixels.all_pages
        train, validation = _hold_out(train, share=split_share, seed=seed, by_file=by_file)

    return _limited(train, max_train_samples, seed=seed), validation


def _kind(name: str) -> Form | None:
    """Return the form of the images that ``name`` stands for, or None if no such path exists."""
    path = Path(name).expanduser()
    if name == SAMPLES:
        return "samples"
    if name == SPRITES:
        _check_no_folder(path)
        return "sprites"
    if name.lower().endswith((".tar", *COMPRESSED_SUFFIXES)):
        return "tar"
    if path.is_dir():
        return _kind_of_folder(path)
    if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        return "table"
    return "folder" if path.exists() else None


def _check_no_folder(path: Path) -> None:
    """Raise UserError if a folder or file has the same name as a built-in data set.

    A name such as ``sprites`` could mean the folder, the file or the built-in data set. Without
    the error, the user could get the wrong images without notice.
    """
    if path.exists():
        raise UserError(
            f"'{path}' is the name of a built-in data set, and the current folder also has a "
            f"folder or file '{path}'. Write './{path}' for the folder. To use the built-in data "
            "set, run the command in another folder."
        )


def _kind_with_options(spec: DatasetSpec) -> Form:
    """Return the form of the images that a ``DatasetSpec`` with options names.

    With options, `datasets` reads a folder of images as a table, because `datasets` can find splits
    in the folder.

    Raises:
        UserError: tar files are given with an option that they do not support, or they have several
            splits.
    """
    kind = _kind(spec.name) or "table"
    if kind == "folder" and Path(spec.name).expanduser().is_dir():
        return "table"
    if kind == "tar":
        _check_tar_options(spec)
    return kind


def _check_tar_options(spec: DatasetSpec) -> None:
    given = {"dataset_config_name": spec.config_name, "image_column": spec.image_column}
    given["dataset_split"] = spec.split if spec.split != "train" else None
    for option, value in given.items():
        if value is not None:
            raise UserError(
                f"{option} is '{value}', but '{spec.name}' names tar files, whose images are all "
                "used. Leave the option out, or give other tar files by their folder or a pattern."
            )
    folder = Path(spec.name).expanduser()
    if folder.is_dir() and len(splits := split_names(folder)) > 1:
        raise UserError(
            f"'{spec.name}' has tar files of the splits {', '.join(splits)}. Give the tar "
            "files of one split, by their folder or a pattern."
        )


def _kind_of_folder(folder: Path) -> Literal["tar", "table", "folder"]:
    if any((folder / name).is_file() for name in SAVED):
        return "table"
    found: set[str] = set()
    try:
        for file in walk(folder):
            found.add(file.suffix.lower())
            if file.suffix.lower() in readable_suffixes() and file.suffix.lower() != ".npy":
                return "folder"
    except OSError:
        return "folder"  # opening the folder reports the error
    if ".tar" in found:  # .npy files beside shards and tables are no images
        return "tar"
    return "table" if found.intersection(TABLE_SUFFIXES) else "folder"


def _hold_out(
    source: ImageSource, *, share: float, seed: int, by_file: bool
) -> tuple[Subset, Subset]:
    """Split images into training and validation. ``by_file`` keeps the pages of a file together.

    If whole files would hold out far more images than ``share``, each page gets its own hash.
    """
    if not 0 < share < 1:
        raise UserError(f"the held-out share must lie between 0 and 1, such as 0.02 (got {share}).")
    if len(source) < 2:
        raise UserError(
            f"there is only one image ('{source.name(0)}'). Give at least two images, so that one "
            "can be held out for validation."
        )

    # All pages of a file get the same hash, so that they stay together. With few files, this could
    # hold out far more images than the share. Then each page gets its own hash.
    draws = _draws(source, seed)
    if by_file:
        shared = [_unit_hash(file_of_page(source.name(i)), seed) for i in range(len(source))]
        if shared.count(min(shared)) <= max(1, 2 * share * len(source)):
            draws = shared
    chosen = _lowest(draws, share)
    parts = ([i for i, held in enumerate(chosen) if held is part] for part in (False, True))
    kept, validation_part = parts
    return Subset(source, kept), Subset(source, validation_part)


def held_out(names: Sequence[str], *, share: float, seed: int) -> list[bool]:
    """Return for each image whether it is held out for validation, by a hash of its name.

    Raises:
        UserError: there are fewer than two different names.
    """
    if len(set(names)) < 2:
        raise UserError(
            f"there are {len(set(names))} images. Give at least two images, so that one can be "
            "held out for validation."
        )
    return _lowest([_unit_hash(name, seed) for name in names], share)


def _lowest(draws: Sequence[float], share: float) -> list[bool]:
    """Return for each hash in [0, 1) whether it is below `share`.

    The lowest hash always counts as below `share`, and the highest hash never does.
    """
    first, last = min(draws), max(draws)
    return [draw == first or (draw < share and draw != last) for draw in draws]


def _limited(source: ImageSource, count: int | None, *, seed: int) -> ImageSource:
    if count is None or count >= len(source):
        return source
    if count < 1:
        raise UserError(f"max_train_samples must be at least 1 (got {count}).")
    draws = _draws(source, seed)
    return Subset(source, sorted(sorted(range(len(draws)), key=draws.__getitem__)[:count]))


def _draws(source: ImageSource, seed: int) -> list[float]:
    return [_unit_hash(source.name(i), seed) for i in range(len(source))]


def _unit_hash(name: str, seed: int) -> float:
    """Return a number in [0, 1) that depends only on the name and the seed."""
    digest = hashlib.sha256(f"{seed}:".encode() + os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _without(train: ImageSource, validation: ImageSource) -> ImageSource:
    """Return ``train`` without the images that are also in ``validation``.

    Raises:
        UserError: no image is left, or two tables share a file.
    """
    # both sources are of the same form
    if isinstance(train, ImageFolder) and isinstance(validation, ImageFolder):
        kept = _other_files(train, validation)
    elif isinstance(train, TarShards) and isinstance(validation, TarShards):
        validation_part = {shard.resolve() for shard in validation.shards}
        shared = {shard for shard in train.shards if shard.resolve() in validation_part}
        kept = [i for i in range(len(train)) if train.shard(i) not in shared]
    elif isinstance(train, HubImages) and isinstance(validation, HubImages):
        _check_other_tables(train, validation)
        return train

    # a folder and a table of the same files
    elif isinstance(train, HubImages | ImageFolder) and isinstance(
        validation, HubImages | ImageFolder
    ):
        validation_part = set(_files(validation))
        kept = [
            i for i, file in enumerate(_files(train)) if file is None or file not in validation_part
        ]
    else:
        return train

    if not kept:
        raise UserError(_all_shared(train))
    return train if len(kept) == len(train) else Subset(train, kept)


def _check_other_tables(train: HubImages, validation: HubImages) -> None:
    if train.origin == validation.origin:
        raise UserError(_all_shared(train))
    ours, theirs = (local_files(t.spec, t.origin[2]) for t in (train, validation))
    if shared := sorted(ours & theirs):
        raise UserError(
            f"'{shared[0]}' is a file of both the training and the validation data, and single "
            "rows cannot be left out. Give other validation data, or none to hold out a share of "
            "the training data."
        )


def _all_shared(train: ImageSource) -> str:
    return (
        f"every training image is also in the validation data (the first is '{train.name(0)}'). "
        "Give other validation data, or none to hold out a share of the training data."
    )


def _files(source: HubImages | ImageFolder) -> list[Path | None]:
    """Return the file of each image with links resolved, or None if no file is known."""
    if isinstance(source, HubImages):
        return source.files()
    return [_real(source.file(i)) for i in range(len(source))]


def _other_files(train: ImageFolder, validation: ImageFolder) -> Sequence[int]:
    """Return the indices of the training images whose file holds no validation image."""
    held = {_file_number(validation.file(i)) for i in range(len(validation))}
    found = [i for i in range(len(train)) if _file_number(train.file(i)) in held]
    if not found:
        return range(len(train))

    # Some network file systems give several files one number, so the path must be equal too. The
    # paths of hard links differ, but their file has more than one link.
    files = set(_files(validation))
    shared = {i for i in found if _real(file := train.file(i)) in files or file.stat().st_nlink > 1}
    return [i for i in range(len(train)) if i not in shared]


def _file_number(file: Path) -> tuple[int, int] | Path:
    """Return the device and the number of a file, which all links to it share."""
    try:
        found = file.stat()
    except OSError:  # a dead link or a link to itself, which is reported when it is read
        return _real(file)
    return found.st_dev, found.st_ino


def _real(file: Path) -> Path:
    """Return the path without links. `Path.resolve` fails for a link to itself."""
    return Path(os.path.realpath(file))
