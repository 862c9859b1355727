"""Read images and their classes as rows, from folders or tables.

    digits/one/a.png             class 0, the first folder by name
    digits/two/b.png             class 1 ...
    digits/unlabelled/c.png      no class: -1

Symbols: `N` images, `C H W` their shape.
"""

import os
from dataclasses import dataclass

import numpy as np

from latentvae.data import EvalTransform, PixelFormat
from latentvae.errors import UserError
from latentvae.latents.items import UNLABELLED_FOLDER, Pictures, find_labels, open_items
from latentvae.semi_supervised.checks import UNLABELLED


@dataclass(frozen=True)
class LabelledRows:
    """Images as rows of numbers, and their classes.

    Attributes:
        rows: pixels in [0, 1], (N, C H W), float32.
        labels: number of each image's class, -1 for an image without a class, (N,), int64.
        classes: names of classes 0, 1, 2, ..., or None if they have no names.
        names: name of each image.
    """

    rows: np.ndarray
    labels: np.ndarray
    classes: list[str] | None
    names: list[str]


def read_images(
    data: str | os.PathLike[str], *, resolution: int | tuple[int, int], channels: int = 1
) -> LabelledRows:
    """Read all images of a folder or table. Files that cannot be read are left out.

    Args:
        data: a folder with one folder per class, a tar file, a parquet file, or `owner/name` of a
            data set on the Hub. Images in the folder `unlabelled`, and table rows with a null
            label, have no class.
        resolution: the images are resized and cropped to this size, (H, W) or one number for both.
        channels: 1 for grey, 3 for RGB.

    Raises:
        UserError: no image can be read, or there are no classes.
    """
    source = open_items(os.fspath(data), pixels=PixelFormat(channels=channels))
    found = find_labels(source, label_column=None)
    if found is None:
        raise UserError(
            f"'{data}' has no classes; put the images of each class into a folder of its own, and "
            f"images without a class into a folder '{UNLABELLED_FOLDER}'."
        )
    pictures = Pictures(source, EvalTransform(resolution))
    good = [item for item in (pictures[i] for i in range(len(source))) if item.image is not None]
    if not good:
        raise UserError(f"'{data}' has no image that can be read.")

    rows = np.stack([(item.image.flatten().numpy() + 1) / 2 for item in good])  # type: ignore[union-attr]
    labels = np.array([found.values[item.number] for item in good])
    names, classes = [item.name for item in good], found.class_names
    if classes is not None and UNLABELLED_FOLDER in classes:
        labels, classes = _without_unlabelled(labels, classes)
    return LabelledRows(rows.clip(0, 1), labels, classes, names)


def _without_unlabelled(labels: np.ndarray, classes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Replace the class of unlabelled images by -1, and number the other classes from 0."""
    place = classes.index(UNLABELLED_FOLDER)
    numbered = np.where(labels > place, labels - 1, labels)
    others = [name for name in classes if name != UNLABELLED_FOLDER]
    return np.where(labels == place, UNLABELLED, numbered), others


def keep_labels(labels: np.ndarray, *, per_class: int, seed: int) -> np.ndarray:
    """Keep `per_class` labels of each class, drawn at random, and return the labels, (N,).

    All other labels become -1.

    Raises:
        UserError: a class has fewer labels than `per_class`.
    """
    generator, kept = np.random.default_rng(seed), np.full_like(labels, UNLABELLED)
    for label in np.unique(labels[labels != UNLABELLED]):
        places = np.flatnonzero(labels == label)
        if len(places) < per_class:
            raise UserError(
                f"class {label} has only {len(places)} labelled rows (per_class is {per_class})."
            )
        kept[generator.choice(places, per_class, replace=False)] = label
    return kept
