"""Count the files that are not used as images, and log the counts in one line."""

import logging
from collections import Counter
from collections.abc import Iterable

from latentvae.data.formats import how_to_read
from latentvae.distributed import launched_rank
from latentvae.errors import printable

# Suffixes of labels, captions and the like, which are expected beside an image of the same name.
TEXT_SUFFIXES = (
    ".caption .cls .cls2 .csv .html .id .index .json .jsonl .md .toml .tsv .txt .xml .yaml .yml"
).split()
SHOWN = 6  # largest number of file kinds that the line names

logger = logging.getLogger(__name__)


def stem(name: str) -> str:
    """Return a path without the last suffix of its file name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.rpartition('.')[0] or file}"


def belongs_to(name: str, stems: set[str]) -> bool:
    """Return whether a file belongs to an image. ``stems`` are the images' paths without suffix.

    ``0001.npy`` and ``0001.latent.npy`` belong to ``0001.jpg``, and so does ``0001.jpg.npy``.
    ``patient7.slice000.npy`` does not belong to ``patient7.overview.png``.
    """
    while (shorter := stem(name)) != name:
        if shorter in stems:
            return True
        name = shorter
    return False


def side_cars(names: Iterable[str]) -> set[str]:
    """Return the ``.npy`` files that belong to an image, such as latents, masks or embeddings.

    Args:
        names: relative paths of the image files and the ``.npy`` files.
    """
    names = list(names)
    arrays = {name for name in names if name.lower().endswith(".npy")}
    stems = {stem(name) for name in names if name not in arrays} if arrays else set[str]()
    return {name for name in arrays if belongs_to(name, stems)}


def count_left_out(images: Iterable[str], others: Iterable[str]) -> Counter[str]:
    """Count the files that are not used. Return the number of files by suffix, such as ``.csv``.

    Args:
        images: the files that are used.
        others: the files that are not used. Labels and captions of an image are not counted.
    """
    stems = {stem(name) for name in images}
    counts: Counter[str] = Counter()
    for name in others:
        kind = suffix(name)
        if kind == ".npy":
            counts[".npy beside an image of the same name"] += 1
        elif kind not in TEXT_SUFFIXES or not belongs_to(name, stems):
            counts[kind or "without a suffix"] += 1
    return counts


def suffix(name: str) -> str:
    """Return the last suffix of a file name in lower case, or "" if it has none."""
    front, _, last = name.rpartition("/")[2].rpartition(".")
    return f".{last.lower()}" if front else ""


def describe(counts: Counter[str]) -> str:
    """Return the counts of kinds of files as text, with the largest count first."""
    shown = [f"{count:,} {kind}" for kind, count in counts.most_common(SHOWN)]
    if (rest := counts.total() - sum(count for _, count in counts.most_common(SHOWN))) > 0:
        shown.append(f"{rest:,} others")
    return ", ".join(shown)


def say_left_out(place: str, *, num_images: int, counts: Counter[str]) -> None:
    """Log one line about the files that are not used, if there are any. Only rank 0 logs it."""
    if counts and launched_rank()[0] == 0:
        logger.warning(
            "%s",
            printable(
                f"'{place}': {num_images:,} images are used. Not used: {describe(counts)}. "
                f"{how_to_read(counts)}".rstrip()
            ),
        )
