"""Draw pictures of a latent space from a user's images (`latentvae latents`).

Each function `draw_...` writes one PNG with labelled rows, and returns its results as plain values
for a JSON file.

`N` images, `C` image channels, `H W` image size, `d h w` shape of a latent.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.data import EvalTransform, PixelFormat, UnreadableImage, spread
from latentvae.errors import UserError, nearest
from latentvae.latents.items import Labels, find_labels, open_items
from latentvae.latents.space import (
    INTERPOLATIONS,
    attribute_direction,
    lerp,
    move_along,
    nearest_latents,
    principal_components,
)
from latentvae.pictures import save_grid

SIDE = 256  # default side of images in pixels, for models that support any size
TEST_SHARE = 3  # every third image of a class tests an attribute's direction


@dataclass(frozen=True)
class EncodedImages:
    """Some of a user's images, with their latents.

    Attributes:
        model: the autoencoder.
        names: the names of the images.
        images: (N, C, H, W) in [-1, 1], on the CPU.
        latents: (N, d, h, w), scaled as a diffusion model sees them, on the CPU in float32.
        labels: the class of each image (None for an image without a class), or None if the data
            has no classes.
    """

    model: Autoencoder
    names: list[str]
    images: Tensor
    latents: Tensor
    labels: list[str | None] | None

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (N, C, H, W) of scaled latents (N, d, h, w), on the CPU."""
        size = (self.images.shape[2], self.images.shape[3])
        parts = [self.model.decode(z, size=size, scaled=True) for z in latents.split(8)]
        return torch.cat([cast(Tensor, part).cpu() for part in parts])

    def numbers(self, wanted: Sequence[str], *, default: Sequence[int]) -> list[int]:
        """Return the indices of the images named in `wanted`, or `default` if `wanted` is empty.

        Raises:
            UserError: `wanted` contains a name that no image has.
        """
        places = {name: number for number, name in enumerate(self.names)}
        for name in wanted:
            if name not in places:
                raise UserError(
                    f"there is no image '{name}' among the {len(places)} images that were "
                    f"read{nearest(name, places)}. Give names relative to the data, or raise "
                    "max_images."
                )
        return [places[name] for name in wanted] or list(default)


def encode_images(
    model: Autoencoder,
    data: str,
    *,
    resolution: int | tuple[int, int],
    max_images: int,
    also: Sequence[str] = (),
    label_column: str | None = None,
    batch_size: int = 8,
) -> EncodedImages:
    """Read and encode images, evenly spread over the data. Unreadable images are left out.

    Args:
        model: the autoencoder. The latents are the modes of the autoencoder's posteriors.
        data: images, see `open_items`.
        resolution: height and width in pixels, or one number for a square. Each image is resized to
            cover this size, and then cropped at the centre.
        max_images: largest number of images that are chosen evenly from the data.
        also: names of images that are read in addition to the evenly chosen images.
        label_column: column of a table with the classes. For folders and tar files, the first-level
            folder of an image is its class.
        batch_size: number of images that are encoded at once.

    Raises:
        UserError: the data cannot be opened, or fewer than two images can be read.
    """
    source = open_items(data, pixels=PixelFormat(model.image_channels))
    found = find_labels(source, label_column=label_column)
    chosen = set(spread(len(source), max_images))
    if also:
        chosen |= {i for i in range(len(source)) if source.name(i) in set(also)}

    # read
    transform = EvalTransform(resolution)
    names, images = [], []
    labels: list[str | None] = []
    for index in sorted(chosen):
        try:
            images.append(transform(source.read(index)))
        except UnreadableImage as error:
            print(f"left out: {error}")
            continue
        names.append(source.name(index))
        if found is not None:
            labels.append(_class_name(found, index))
    if len(images) < 2:
        raise UserError(f"'{data}' has {len(images)} readable images, and at least 2 are needed.")

    # encode
    pixels = torch.stack(images)
    parts = [model.encode(part, scaled=True).float().cpu() for part in pixels.split(batch_size)]
    return EncodedImages(model, names, pixels, torch.cat(parts), labels if any(labels) else None)


def draw_interpolations(
    encoded: EncodedImages, path: Path, *, images: Sequence[str], count: int, steps: int
) -> dict[str, Any]:
    """Draw three rows for each pair of images: two interpolations of latents, and one of pixels.

    The latents are interpolated on a straight line and on an arc. The first and the last column
    show the originals. The row of pixels shows what interpolation does without an autoencoder.

    Args:
        encoded: the images.
        path: the PNG.
        images: names of two or more images. Each image and the next one are a pair. If `images` is
            empty, images that are evenly spread over the data are used.
        count: number of pairs to draw, if `images` is empty.
        steps: number of images in a row, between the two originals.
    """
    default = spread(len(encoded.names), count + 1)
    numbers = encoded.numbers(images, default=default)
    if len(numbers) < 2:
        raise UserError(f"an interpolation needs two images (got {len(numbers)}): {images[0]}.")
    weights = torch.linspace(0, 1, steps)

    cells, labels, pairs = [], [], []
    for first, second in itertools.pairwise(numbers):
        originals = encoded.images[first], encoded.images[second]
        rows = {
            kind: encoded.decode(walk(encoded.latents[first], encoded.latents[second], weights))
            for kind, walk in INTERPOLATIONS.items()
        }
        rows["pixels"] = lerp(*originals, weights)
        for kind, row in rows.items():
            cells += [originals[0][None], row, originals[1][None]]
            labels.append(kind)
        pairs.append([encoded.names[first], encoded.names[second]])
    save_grid(torch.cat(cells), path, labels=labels)
    return {"pairs": pairs}


def draw_neighbours(
    encoded: EncodedImages, path: Path, *, images: Sequence[str], count: int, steps: int
) -> dict[str, Any]:
    """Draw a row for each query image: the image, then its neighbours with the nearest latents.

    Args:
        encoded: the images.
        path: the PNG.
        images: names of the query images. If `images` is empty, images that are evenly spread over
            the data are used.
        count: number of query images, if `images` is empty.
        steps: number of neighbours.
    """
    queries = encoded.numbers(images, default=spread(len(encoded.names), count))
    wanted = min(steps, len(encoded.names) - 1)
    similarity, numbers = nearest_latents(
        encoded.latents[queries], encoded.latents, count=wanted + 1
    )
    cells, labels, found = [], [], []

    for row, query in enumerate(queries):
        others = [
            (number, value)
            for number, value in zip(numbers[row].tolist(), similarity[row].tolist(), strict=True)
            if number != query
        ][:wanted]
        cells.append(encoded.images[[query, *(number for number, _ in others)]])
        labels.append(_label(encoded.names[query]))
        found.append(
            {
                "image": encoded.names[query],
                "neighbours": [
                    {"image": encoded.names[number], "similarity": value}
                    for number, value in others
                ],
            }
        )
    save_grid(torch.cat(cells), path, labels=labels)
    return {"queries": found}


def draw_attribute(
    encoded: EncodedImages,
    path: Path,
    *,
    attribute: str,
    against: str | None,
    images: Sequence[str],
    count: int,
    steps: int,
) -> dict[str, Any]:
    """Draw images whose latents are moved along the direction from `against` to `attribute`.

    The strengths go from -1 to 2. Strength 1 is the distance between the means of the two classes.

    The direction is computed from two thirds of the images of each class. The other images test the
    direction. The result `test_accuracy` is the fraction of test images whose class the sign of
    `Attribute.scores` predicts correctly, averaged over the two classes. An accuracy of 0.5 means
    that the direction does not separate the classes.

    Args:
        encoded: the images, with classes.
        path: the PNG.
        attribute: the class of images with the attribute.
        against: the class of images without the attribute. None means all other classes. Images
            without a class are not used.
        images: names of the images that are moved. If `images` is empty, images without the
            attribute are used.
        count: number of images, if `images` is empty.
        steps: number of strengths.

    Raises:
        UserError: the images have no classes, or one of the two classes does not exist or has too
            few images.
    """
    present = _of_class(encoded, attribute)
    if against is None:
        labels = enumerate(encoded.labels or ())
        absent = [number for number, label in labels if label not in (attribute, None)]
    else:
        absent = _of_class(encoded, against)
    if attribute == against or min(len(present), len(absent)) < TEST_SHARE:
        raise UserError(
            f"an attribute needs two classes of at least {TEST_SHARE} images each (got "
            f"{len(present)} of '{attribute}' and {len(absent)} of '{against or 'all others'}'). "
            "Give other classes, or raise max_images."
        )

    # direction, and its test on other images
    groups = present, absent
    learn = [_without_test(rows) for rows in groups]
    test = [rows[::TEST_SHARE] for rows in groups]
    direction = attribute_direction(*(encoded.latents[rows] for rows in learn))
    right = [direction.scores(encoded.latents[rows]) for rows in test]
    accuracy = ((right[0] > 0).float().mean() + (right[1] < 0).float().mean()).item() / 2

    # pictures
    shown = encoded.numbers(images, default=test[1][:count])
    strengths = torch.linspace(-1, 2, steps)
    cells = []
    for number in shown:
        moved = direction.apply(encoded.latents[number], strengths)
        cells += [encoded.images[[number]], encoded.decode(moved)]
    save_grid(torch.cat(cells), path, labels=[_label(encoded.names[number]) for number in shown])
    return {
        "attribute": attribute,
        "against": against,
        "images": [len(rows) for rows in learn],
        "test_images": [len(rows) for rows in test],
        "test_accuracy": accuracy,
        "strengths": strengths.tolist(),
    }


def draw_components(
    encoded: EncodedImages, path: Path, *, images: Sequence[str], count: int, steps: int
) -> dict[str, Any]:
    """Draw one row for each principal component: an image whose latent moves along the component.

    The latent is moved by -2 to 2 standard deviations along the component.

    Args:
        encoded: the images.
        path: the PNG.
        images: the name of the image that is moved. If `images` is empty, the first image is used.
        count: number of components.
        steps: number of images in a row.

    Raises:
        UserError: `images` has more than one name.
    """
    if len(images) > 1:
        raise UserError(f"a traversal moves one image (got {len(images)}). Give one name.")
    (start,) = encoded.numbers(images, default=[0])
    wanted = min(count, len(encoded.names) - 1)

    components = principal_components(encoded.latents, count=wanted)
    strengths = torch.linspace(-2, 2, steps)
    moved = move_along(encoded.latents[start], components.directions, strengths)
    labels = [f"PC{i + 1}  {100 * share:.1f} %" for i, share in enumerate(components.shares)]
    save_grid(encoded.decode(moved.flatten(0, 1)), path, labels=labels)
    return {"image": encoded.names[start], "variance_shares": components.shares.tolist()}


def _label(name: str) -> str:
    """Return the end of a file's name, which is short enough to be the label of a row."""
    return Path(name).stem[-13:]


def _class_name(labels: Labels, index: int) -> str | None:
    """Return the name of an image's class, or the class number if classes have no names.

    If classes have names, the number -1 means that the image has no class: the result is None.
    """
    number = labels.values[index]
    if labels.class_names is None:
        return str(number)
    return None if number < 0 else labels.class_names[number]


def _of_class(encoded: EncodedImages, name: str) -> list[int]:
    if encoded.labels is None:
        raise UserError(
            "an attribute needs images in classes. Put them into two or more folders, such as "
            "faces/smiling and faces/neutral, and give faces as the data."
        )
    numbers = [number for number, label in enumerate(encoded.labels) if label == name]
    if not numbers:
        known = sorted({label for label in encoded.labels if label is not None})
        raise UserError(
            f"there is no class '{name}', only {', '.join(known[:20])}{nearest(name, known)}"
        )
    return numbers


def _without_test(rows: list[int]) -> list[int]:
    return [number for place, number in enumerate(rows) if place % TEST_SHARE]
