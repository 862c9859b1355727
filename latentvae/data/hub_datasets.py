"""Read tables of images with Hugging Face ``datasets``: parquet or arrow files, or the Hub.

https://huggingface.co/docs/datasets. ``datasets`` finds and downloads the rows. ``read_image``
decodes the images, so that a file gives the same image from every source. What ``datasets``
downloads or converts goes to ``cache_dir`` (by default the cache folder of ``datasets``), never
beside the data.
"""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec import available_protocols

from latentvae.data.image_folder import inner_name, read_named
from latentvae.data.pixels import Picture, PixelFormat
from latentvae.data.reading import NOT_A_FILE, UnreadableImage
from latentvae.data.sizes import read_size
from latentvae.errors import UserError, check_no_password, first_line, nearest

if TYPE_CHECKING:  # importing datasets takes a second, so functions import it when needed
    from datasets import Features

TABLE_SUFFIXES = (".parquet", ".arrow")
PLACES = ("", "file", "https", "http", "hf", "zip")  # protocols that a file path in a cell may have
# The protocols of fsspec. Parts of a chained URL may have these names.
KINDS_OF_FSSPEC = frozenset(available_protocols())
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes into a folder


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set of images: the name of a Hub data set or a local path, with options to open it.

    Attributes:
        name: a Hub id such as ``"user/photos"``, or an existing path.
        config_name: name of the configuration, which is needed if the data set has several
            configurations.
        split: name of the split. If a data set has only one split, `train` opens this split,
            even if the split has another name.
        image_column: name of the column of images, which is needed if several columns hold images.
        cache_dir: folder in which ``datasets`` keeps what it downloads and prepares.
        any_split: if a data set has only one split, open this split and ignore ``split``.
    """

    name: str
    config_name: str | None = None
    split: str = "train"
    image_column: str | None = None
    cache_dir: str | None = None
    any_split: bool = False

    def __post_init__(self) -> None:
        check_no_password(self.name)


class HubImages:
    """An image source that reads a table. The images are sorted by name.

    An image's name is the path stored with it, without the folder that all absolute paths share. A
    row without a path, or with the same path as another row, is named by its split and number:
    ``train/000000012``. So a table without paths keeps the order of its rows.

    Args:
        spec: the data set.
        pixels: the format of every image. None means 8-bit RGB.

    Attributes:
        origin: (path or name of the data set, name of its configuration, name of its split).
        numbered: whether some rows are named by their numbers. Numbers do not identify an image,
            because another column or configuration has rows with the same numbers.

    Example:
        photos = HubImages(DatasetSpec(name="photos.parquet"))
        photos.name(0), photos.read(0).size  # ("a/0001.jpg", (640, 480))
    """

    def __init__(self, spec: DatasetSpec, *, pixels: PixelFormat | None = None) -> None:
        self.pixels = pixels
        rows, split = open_rows(spec)
        path = Path(spec.name).expanduser()
        self.spec = spec
        self._folder = table_folder(spec.name)
        self.origin = (str(path.resolve()) if path.exists() else spec.name, spec.config_name, split)
        self.column = image_column(rows.features, wanted=spec.image_column)
        self.rows = undecoded(rows, self.column)
        self._table = rows
        column = f"{self.column}.path"
        try:
            paths = list(self.rows.flatten().select_columns(column)[column])
        except Exception as error:  # pyarrow and datasets raise their own types for damaged tables
            raise UserError(
                f"data set '{spec.name}' cannot be read: {_first_line(error)}"
            ) from error
        names = _row_names(paths, split)
        self.numbered = any(name == _number(split, row) for row, name in enumerate(names))
        self._order = sorted(range(len(names)), key=names.__getitem__)
        self.names = [names[row] for row in self._order]
        self._paths = [paths[row] for row in self._order]
        if not self.names:
            raise UserError(f"data set '{spec.name}' has no rows in its split '{split}'")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int, /) -> str:
        return self.names[index]

    def labels(self, column: str | None = None) -> tuple[list[int], list[str] | None] | None:
        """Return the class of each image, and the names of the classes if there are names.

        A null value becomes class -1.

        Args:
            column: a column of integers or of `datasets.ClassLabel`. With None, the column `label`
                is used. If `label` does not exist or has another type, the result is None.

        Raises:
            UserError: `column` does not exist or holds values of another type.
        """
        from datasets import ClassLabel

        features = dict(self._table.features)
        kind = features.get(column or "label")
        if not isinstance(kind, ClassLabel) and "int" not in str(getattr(kind, "dtype", "")):
            if column is None:
                return None
            if kind is not None:
                raise UserError(
                    f"column '{column}' must hold integers or classes (got {kind}). Give another "
                    "column."
                )
            near = nearest(column, features)
            raise UserError(f"there is no column '{column}', only {', '.join(features)}{near}")
        stored = list(self._table.select_columns([column or "label"])[column or "label"])
        values = [-1 if stored[row] is None else int(stored[row]) for row in self._order]
        return values, list(kind.names) if isinstance(kind, ClassLabel) else None

    def texts(self, column: str | None, *, default: Sequence[str]) -> list[str] | None:
        """Return the text of each image from a column of strings. A null value becomes "".

        White space at the start and the end of a text is removed.

        Args:
            column: the column. With None, the first name in `default` that is a column of strings
                is used, and the result is None if there is no such column.

        Raises:
            UserError: `column` does not exist or holds values of another type.
        """
        features = dict(self._table.features)
        kinds = {name: str(getattr(kind, "dtype", kind)) for name, kind in features.items()}
        strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]

        if column is None:
            column = next((name for name in default if name in strings), None)
            if column is None:
                return None
        elif column not in kinds:
            near = nearest(column, features)
            raise UserError(f"there is no column '{column}', only {', '.join(features)}{near}")
        elif column not in strings:
            raise UserError(
                f"column '{column}' must hold one text for each image (got {kinds[column]}). Give "
                "another column."
            )

        stored = list(self._table.select_columns([column])[column])
        return [(stored[row] or "").strip() for row in self._order]

    def read(self, index: int, /, *, at_least: int | None = None) -> Picture:
        cell = self.rows[self._order[index]][self.column]
        name = self.name(index)
        data = cell_bytes(cell, name, folder=self._folder)
        return read_named(name, data, at_least=at_least, pixels=self.pixels)

    def files(self) -> list[Path | None]:
        """Return each image's local file with links resolved, or None if its file is not known.

        The file is known if the path in the row is absolute, or is found in the table's folder. The
        file of a row without bytes is also known if its path is found in the current folder.
        """
        return [self._file(index) for index in range(len(self))]

    def _file(self, index: int) -> Path | None:
        path = self._paths[index]
        read = _below(self._folder, path) if path else ""
        if os.path.isabs(read):
            return Path(read).resolve()
        if not read or not os.path.exists(read):
            return None

        # The path is found in the current folder, where only a row without bytes is read.
        cell = self.rows[self._order[index]][self.column]
        if isinstance(cell, str) or (isinstance(cell, dict) and cell.get("bytes") is None):
            return Path(read).resolve()
        beside = None if self._folder is None else self._folder / read
        return beside.resolve() if beside is not None and beside.exists() else None

    def size(self, index: int, /) -> tuple[int, int]:
        name = self.name(index)
        cell = self.rows[self._order[index]][self.column]
        return read_size(cell_bytes(cell, name, folder=self._folder), name=name)


def open_rows(spec: DatasetSpec, *, streaming: bool = False) -> tuple[Any, str]:
    """Open a data set. Return the rows of one split with all columns, and the split's name.

    Raises:
        UserError: the data set is missing, damaged or cannot be reached, or has no such split.
    """
    from datasets import load_dataset, load_from_disk

    path = Path(spec.name).expanduser()
    options: dict[str, Any] = {"cache_dir": spec.cache_dir, "streaming": streaming}
    _check_files(path)

    # open
    try:
        if path.is_dir() and any((path / name).exists() for name in SAVED):
            found = load_from_disk(str(path))
        elif path.is_file():
            kind = path.suffix.lower().removeprefix(".")
            # Escape the path, because datasets treats data_files as patterns.
            found = load_dataset(kind, data_files=glob.escape(str(path)), **options)
        else:
            name = str(path) if path.exists() else spec.name
            options["data_files"] = _literal_patterns(path, spec.config_name)
            found = load_dataset(name, spec.config_name, **options)
    # Catch any type: the network, the Hub's client, pyarrow and datasets raise their own types.
    except Exception as error:
        raise UserError(f"data set '{spec.name}' cannot be opened: {_first_line(error)}") from error

    # choose the split
    any_split = spec.any_split or spec.split == "train"
    if not isinstance(found, dict):  # a data set that was saved without splits
        if any_split or found.split is None:
            return found, spec.split
        found = {found.split: found}
    splits = {str(split): rows for split, rows in found.items()}
    if spec.split in splits:
        return splits[spec.split], spec.split
    if any_split and len(splits) == 1:
        return next(iter(splits.values())), next(iter(splits))
    raise UserError(
        f"data set '{spec.name}' has no split '{spec.split}', only {', '.join(splits)}"
        f"{nearest(spec.split, splits)}"
    )


def _literal_patterns(folder: Path, config_name: str | None) -> dict[str, list[str]] | None:
    """Return file patterns by split, for a folder with a ``*``, ``?`` or ``[`` in its path.

    ``datasets`` would treat a ``*`` in the path as a wildcard, and open other files. If the path
    has no wildcard, the result is None: ``datasets`` then finds the files itself.

    Raises:
        UserError: the path has a ``*``, ``?`` or ``[``, and a configuration is given. Only
            ``datasets`` knows the files of a configuration.
    """
    from datasets.data_files import get_data_patterns

    if not folder.is_dir() or not glob.has_magic(str(folder.resolve())):
        return None
    if config_name is not None:
        raise UserError(
            f"dataset_config_name '{config_name}' cannot be used with '{folder}', because its path "
            "has a *, ? or [. Rename the folder."
        )
    escaped = glob.escape(str(folder.resolve()))
    return {
        str(split): [f"{escaped}/{pattern}" for pattern in patterns]
        for split, patterns in get_data_patterns(escaped).items()
    }


def _check_files(path: Path) -> None:
    """Check that a folder of tables has no pipe or device, because reading one would hang."""
    for file in path.rglob("*") if path.is_dir() else ():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(f"'{file}' is not a regular file")


def local_files(spec: DatasetSpec, split: str) -> set[Path]:
    """Return the local files, with links resolved, that hold the rows of a split."""
    from datasets import load_dataset_builder

    path = Path(spec.name).expanduser()
    if path.is_file():
        return {path.resolve()}
    if not path.is_dir():
        return set()
    if any((path / name).exists() for name in SAVED):
        folder = path / split if (path / "dataset_dict.json").exists() else path
        return {file.resolve() for file in folder.rglob("*.arrow")}
    builder: Any = load_dataset_builder(
        str(path),
        spec.config_name,
        cache_dir=spec.cache_dir,
        data_files=_literal_patterns(path, spec.config_name),
    )
    files = (builder.config.data_files or {}).get(split, [])
    return {Path(file).resolve() for file in files}


def split_names(folder: Path) -> list[str]:
    """Return the splits that `datasets` sees in the file names of a folder, or an empty list."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    try:
        return sorted(map(str, get_data_patterns(glob.escape(str(folder.resolve())))))
    except EmptyDatasetError:
        return []


def image_column(features: "Features | None", *, wanted: str | None) -> str:
    """Return the name of the column of images: ``wanted``, or the only column of images.

    If no column has the type `datasets.Image`, columns of file bytes count as columns of images. A
    column of paths is used only if it is ``wanted``.

    Raises:
        UserError: ``wanted`` does not exist or does not hold images. Or ``wanted`` is None, and
            there is no column of images or more than one.
    """
    from datasets import Image as ImageFeature

    columns = dict(features or {})
    if wanted is not None and wanted not in columns:
        near = nearest(wanted, columns)
        raise UserError(f"there is no column '{wanted}', only {', '.join(columns)}{near}")

    # columns by their kind
    images = [name for name, kind in columns.items() if isinstance(kind, ImageFeature)]
    bytes_like = [name for name, kind in columns.items() if _holds_files(kind)]
    paths = [name for name, kind in columns.items() if _holds_paths(kind)]
    lists = [name for name, kind in columns.items() if _holds_lists(kind)]

    # the wanted column
    if wanted is not None and wanted in lists:
        raise UserError(_flatten_first(wanted))
    if wanted is not None and wanted not in images + bytes_like + paths:
        raise UserError(
            f"column '{wanted}' holds {columns[wanted]}, not images"
            + (
                f". Columns of images: {', '.join(images + bytes_like)}"
                if images + bytes_like
                else ""
            )
        )
    found = [wanted] if wanted is not None else images or bytes_like
    if len(found) == 1:
        return found[0]

    # which columns are possible
    if lists and not found:
        raise UserError(_flatten_first(lists[0]))
    several = f"several columns of images ({', '.join(found)})" if found else "no image column"
    choice = f"one of {', '.join(found)}" if found else "a column of paths or files"
    texts = f" Columns of text, which may be paths: {', '.join(paths)}." if paths else ""
    advice = f"Set image_column to {choice}.{texts}" if found or paths else "Give other data."
    raise UserError(f"the data set has {several}. Its columns are {', '.join(columns)}. {advice}")


def _flatten_first(column: str) -> str:
    """Return advice on how to turn a column of lists of images into one row per image."""
    return (
        f"column '{column}' holds a list of images in each row, but one image per row is needed. "
        "Write a table of them first, where rows is the data set and Image and List come from "
        f"`datasets`: `rows.cast_column('{column}', List(Image(decode=False))).map(lambda batch: "
        f"dict(image=sum(batch['{column}'], [])), batched=True, remove_columns=rows.column_names, "
        "features=Features(image=Image())).to_parquet('images.parquet')`."
    )


def undecoded(rows: Any, column: str) -> Any:
    """Return only one column of the rows, undecoded, as ``{"bytes": ..., "path": ...}``."""
    from datasets import Image as ImageFeature

    return rows.select_columns([column]).cast_column(column, ImageFeature(decode=False))


def cell_bytes(cell: dict[str, Any] | None, name: str, *, folder: Path | None = None) -> bytes:
    """Return the bytes of the image in a cell. If the cell holds only a path, read that file.

    Args:
        cell: ``{"bytes": ..., "path": ...}`` of the image file.
        name: the name of the image in an error.
        folder: the table's folder. A relative path is looked up in the current folder, then in this
            folder.

    Raises:
        UnreadableImage: the cell is empty (null), or its file cannot be read.
    """
    import fsspec

    if not cell or (cell["bytes"] is None and cell["path"] is None):
        raise UnreadableImage(name, "the row has no image")
    if cell["bytes"] is not None:
        return cell["bytes"]
    path = _below(folder, cell["path"])
    _check_place(path, name)
    try:
        if os.path.isfile(path):  # fsspec would interpret some characters
            return Path(path).read_bytes()
        with fsspec.open(path, "rb") as file:  # the file is on the Hub if the data set is streamed
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # the file system's client raises its own errors
        raise UnreadableImage(name, _first_line(error)) from error


def _below(folder: Path | None, path: str) -> str:
    """Return a relative path joined to the table's folder, if the joined path exists.

    Otherwise, or if the path exists in the current folder, return the path unchanged.
    """
    if folder is None or "\0" in path or os.path.isabs(path) or os.path.exists(path):
        return path
    return str(folder / path) if (folder / path).exists() else path


def table_folder(name: str) -> Path | None:
    """Return the folder that contains a local table, or None for a data set of the Hub."""
    path = Path(name).expanduser()
    return path.resolve() if path.is_dir() else path.resolve().parent if path.exists() else None


def _check_place(path: str, name: str) -> None:
    """Check that a cell names a file on this machine, the web or the Hub, perhaps in a zip file.

    fsspec also knows file systems that start programs or log in to servers. They are refused.

    Raises:
        UnreadableImage: the cell names a file on another file system, or a pipe. Reading a pipe
            would hang.
    """
    if "\0" in path:
        raise UnreadableImage(name, "its path has a null byte")
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise UnreadableImage(name, NOT_A_FILE)
        return
    for link in path.split("::"):
        kind = link.partition("://")[0] if "://" in link else ""
        if kind not in PLACES or (not kind and link in KINDS_OF_FSSPEC):
            raise UnreadableImage(name, f"tables may not name images by paths of {kind or link}")


def _holds_files(kind: Any) -> bool:
    """Return whether a column without the type `datasets.Image` holds files.

    A file is bytes, or a struct of bytes and path, which may lack one of these two fields.
    """
    if isinstance(kind, dict):
        return bool(kind) and set(kind) <= {"bytes", "path"}
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _holds_paths(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _holds_lists(kind: Any) -> bool:
    """Return whether a column holds lists of images, of files or of bytes."""
    from datasets import Image as ImageFeature

    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    return inner is not None and (isinstance(inner, ImageFeature) or _holds_files(inner))


def _row_names(paths: list[str | None], split: str) -> list[str]:
    """Return the name of each row: its stored path if unique, else its split and number."""
    absolute = [path for path in paths if path and os.path.isabs(path)]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute]) if absolute else ""
    names = [inner_name((path or "").removeprefix(root)) for path in paths]
    times = Counter(names)
    return [
        name if name and times[name] == 1 else _number(split, row) for row, name in enumerate(names)
    ]


def _number(split: str, row: int) -> str:
    return f"{split}/{row:09d}"


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error  # datasets wraps errors that occur while it prepares a split
    return first_line(cause)
