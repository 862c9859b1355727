"""Encode every image at the nearest of several aspect ratios (`--aspect_ratio_buckets`).

All encoded images of a folder of shards (files) have one shape. So each shape (bucket) gets its own
folder, such as `OUT/192x320`. The folder of each shape has the usual format of shards. A class of
images has the same label number in the folders of all shapes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentvae.autoencoder import Autoencoder
from latentvae.data import (
    DatasetSpec,
    ImageSource,
    PixelFormat,
    set_pixel_limit,
)
from latentvae.data.buckets import Buckets, aspect_ratios, assign, bucket_sizes
from latentvae.distributed import launched_rank
from latentvae.errors import UserError
from latentvae.latents.describe import check_resolution
from latentvae.latents.encode import encode_folder
from latentvae.latents.finishing import NothingReadable
from latentvae.latents.formats.shards import MANIFEST, Manifest
from latentvae.latents.items import SomeItems, given_name, open_items
from latentvae.latents.opening import open_model


def encode_buckets(
    model: Autoencoder | str | Path,
    data: str | os.PathLike[str] | DatasetSpec,
    out: str | Path,
    *,
    resolution: int | Sequence[int],
    aspect_ratio_buckets: int,
    value_range: tuple[float, float] | None = None,
    ignore_icc: bool = False,
    max_pixels: int | None = None,
    all_pages: bool = False,
    optimize: Any = None,
    variant: str | None = None,
    device: str | None = None,
    **options: Any,
) -> dict[Path, Manifest | None]:
    """Encode all images, and write one folder of shards for each shape into `out`.

    Args:
        model, data, out, value_range, ignore_icc, max_pixels, all_pages, optimize, variant, device:
            see `encode_folder`.
        resolution: side of a square, or (height, width), in pixels. Each shape has about as many
            pixels as an image of this size.
        aspect_ratio_buckets: largest number of shapes. Before the sides are rounded to multiples of
            the downsampling factor, the aspect ratios of the shapes lie between 1:2 and 2:1. A
            shape that is nearest to no image is left out.
        options: other options of `encode_folder`.

    Returns:
        The manifest of each folder, or None if other ranks are still writing the folder. A shape is
        left out if none of its images can be read.

    Raises:
        UserError: as in `encode_folder`, or if `out` itself holds shards or holds folders of other
            shapes.
    """
    # open model and images
    out, name = Path(out).expanduser(), str(model.name if isinstance(model, Autoencoder) else model)
    set_pixel_limit(max_pixels)
    if not isinstance(model, Autoencoder):
        model = open_model(model, device=device, optimize=optimize, variant=variant)
    pixels = PixelFormat(
        model.image_channels,
        value_range,
        ignore_icc=ignore_icc,
        max_pixels=max_pixels,
        all_pages=all_pages,
    )
    source = open_items(data, pixels=pixels)

    # the shape of each image
    sides = check_resolution(model, resolution)
    multiple = model.f * model.normalization.fold
    area = (sides, sides) if isinstance(sides, int) else sides
    sizes = bucket_sizes(area, aspect_ratio_buckets, multiple=multiple)
    buckets = _assign(source, sizes)
    folders = [out / f"{height}x{width}" for height, width in buckets.sizes]
    _refuse_other_shapes(out, folders)
    if launched_rank()[0] == 0:
        print(f"shapes: {buckets.describe()} images", flush=True)

    # encode shape by shape
    manifests: dict[Path, Manifest | None] = {}
    failures: list[NothingReadable] = []
    for bucket, (size, folder) in enumerate(zip(buckets.sizes, folders, strict=True)):
        numbers = np.flatnonzero(buckets.of == bucket).tolist()
        try:
            manifests[folder] = encode_folder(
                model,
                SomeItems(source, numbers, given_name(data)),
                folder,
                resolution=size,
                value_range=value_range,
                ignore_icc=ignore_icc,
                max_pixels=max_pixels,
                all_pages=all_pages,
                model_name=name,
                **options,
            )
        except NothingReadable as error:
            failures.append(error)
            print(f"{folder.name}: {error}", flush=True)
    if not manifests:
        raise failures[0]
    return manifests


def _assign(source: ImageSource, sizes: tuple[tuple[int, int], ...]) -> Buckets:
    """Assign every image to a bucket. Unreadable images get the bucket with the most images."""
    ratios = aspect_ratios(source, unreadable=np.nan)
    readable = ~np.isnan(ratios)
    if not readable.any():
        return Buckets(sizes[:1], np.zeros(len(source), dtype=int))

    found = assign(ratios[readable], sizes, at_least=1)
    of = np.full(len(source), np.bincount(found.of).argmax())
    of[readable] = found.of
    return Buckets(found.sizes, of)


def _refuse_other_shapes(out: Path, folders: list[Path]) -> None:
    """Raise UserError if `out` itself holds shards, or a folder of shards not in `folders`."""
    if (out / MANIFEST).exists() or next(out.glob("shard-*.safetensors"), None) is not None:
        raise UserError(
            f"'{out}' itself holds shards of one shape. Give another output folder for the "
            f"{len(folders)} shapes."
        )
    for manifest in sorted(out.glob(f"*/{MANIFEST}")):
        if manifest.parent not in folders:
            raise UserError(
                f"'{out}' holds shards of the shape {manifest.parent.name}, but the shapes of this "
                f"encoding are {', '.join(folder.name for folder in folders)}. Give another output "
                "folder."
            )
