"""Find the pages of TIFF files, and name each page."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any

import tifffile

from latentvae.distributed import launched_rank
from latentvae.errors import printable

LOOKED_AT = 1000  # largest number of TIFF files whose pages are counted
_PAGE = re.compile(r"-page\d{4,}(?=\.[^./]*$)")

logger = logging.getLogger(__name__)

Open = Callable[[int], AbstractContextManager[IO[bytes]]]


def is_tiff(name: str) -> bool:
    """Return whether a file name ends with the suffix of a TIFF file."""
    return name.lower().endswith((".tif", ".tiff"))


def page_numbers(file: IO[bytes]) -> list[int]:
    """Return the numbers, from 0, of the pages that are separate pictures.

    Smaller versions of another page and transparency masks do not count. For a file that
    cannot be read, the result is [0], so that a later attempt to read the file reports the reason.
    """
    try:
        with tifffile.TiffFile(file) as tiff:
            if len(tiff.pages) < 2:
                return [0]
            pages: list[Any] = list(tiff.pages)
            found = [i for i, page in enumerate(pages) if not (page.is_reduced or page.is_mask)]
    except Exception:  # tifffile raises any type for a damaged file
        return [0]
    return found or [0]


def page_name(name: str, page: int) -> str:
    """Return a name for a page (from 0): ``stack-page0001.tif`` for page 0 of ``stack.tif``."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}-page{page + 1:04d}{suffix}"


def file_of_page(name: str) -> str:
    """Remove the page number from a page's name. All pages of a file give the same result."""
    return _PAGE.sub("", name) if is_tiff(name) else name


def find_pages(
    names: Sequence[str], open_file: Open, *, all_pages: bool, place: str
) -> list[tuple[int, int | None]]:
    """Return (file number, page number) of each image: one image per page, or one per file.

    The page number is None if only one image comes from the file. If only the first page of each
    file is used, a warning says how many files have more pages. For this warning, at most
    `LOOKED_AT` TIFF files are checked.

    Args:
        names: the files.
        open_file: opens a file by its number.
        all_pages: whether every page is a separate image.
        place: where the files are stored, for the warning.
    """
    tiffs = [i for i, name in enumerate(names) if is_tiff(name)]
    step = 1 if all_pages else -(-len(tiffs) // LOOKED_AT) or 1
    several: dict[int, list[int]] = {}
    for i in tiffs[::step]:
        try:
            with open_file(i) as file:
                pages = page_numbers(file)
        except OSError:
            continue  # the reason is reported when the file is read
        if len(pages) > 1:
            several[i] = pages

    if several and not all_pages and launched_rank()[0] == 0:
        first = next(iter(several))
        of = f"of {len(tiffs[::step]):,} checked files " if step > 1 else ""
        text = (
            f"'{place}': {len(several):,} TIFF files {of}have several pages, such as "
            f"'{names[first]}' with {len(several[first])}. Only their first page is used. "
            "Training, encode and evaluate use all pages with --all_pages."
        )
        logger.warning("%s", printable(text))
    if not all_pages:
        several = {}
    return [(i, page) for i in range(len(names)) for page in several.get(i, [None])]
