"""Encode every image of a data set once, into shards (files), for `latentvae encode`.

With W processes, the process of rank r writes the shards r, r + W, r + 2W and so on, except those
that exist already. All images of a batch belong to the same shard. So the files do not depend on
the number of ranks, or on when the command was killed. To write the missing shards, run the same
command again. Ranks do not communicate. Any rank that finds all shards complete writes the
manifest, and the manifest of every rank is the same.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from latentvae.autoencoder import Autoencoder
from latentvae.compute.optimization import Optimize
from latentvae.compute.precision import full_float32
from latentvae.data import DatasetSpec, EvalTransform, PixelFormat
from latentvae.distributed import launched_rank
from latentvae.errors import UserError
from latentvae.latents.captions import find_captions
from latentvae.latents.describe import check_resolution, describe
from latentvae.latents.finishing import finish
from latentvae.latents.formats.shards import (
    MANIFEST,
    Content,
    Manifest,
    ShardHeader,
    read_header,
    read_manifest,
    sha256_of,
    shard_path,
    sweep_temporary,
    table_path,
)
from latentvae.latents.items import (
    Pictures,
    SomeItems,
    data_sha256,
    find_labels,
    given_name,
    open_items,
)
from latentvae.latents.opening import open_model
from latentvae.latents.writing import write_shards


@full_float32()
def encode_folder(
    model: Autoencoder | str | Path,
    data: str | os.PathLike[str] | DatasetSpec | SomeItems,
    out: str | Path,
    *,
    resolution: int | Sequence[int],
    batch_size: int = 16,
    num_workers: int = 0,
    shard_items: int = 4096,
    dtype: Literal["float16", "bfloat16", "float32"] | None = None,
    moments: bool = False,
    interpolation: str = "lanczos",
    value_range: tuple[float, float] | None = None,
    ignore_icc: bool = False,
    max_pixels: int | None = None,
    all_pages: bool = False,
    flip: bool = False,
    label_column: str | None = None,
    caption_column: str | None = None,
    overwrite: bool = False,
    optimize: Optimize | None = None,
    variant: str | None = None,
    device: str | None = None,
    model_name: str | None = None,
) -> Manifest | None:
    """Encode all images to tokens or latents, and write shards into the folder `out`.

    The module `latents.formats.shards` describes the format.

    The items are tokens if the model is a tokenizer, else latents. Each image is converted to the
    model's channels (grey, RGB or RGBA), with the bit depth of its file. Each image is resized (a
    small image is enlarged) to cover `resolution`, and then cropped at the centre. The file
    manifest.json lists images that cannot be read.

    Args:
        model: an autoencoder, or its folder or Hub id.
        data: the images, as for `data.open_source`, or `owner/name` of a data set on the Hub. The
            training split of a table or of the sample photos is encoded, unless a `DatasetSpec`
            names another split.
        resolution: pixels on a side, or (height, width). Each side must be a multiple of the
            downsampling factor f (for FLUX.2, of 2 f).
        batch_size: images per forward pass. Another batch size may change the last digits of
            latents.
        num_workers: extra processes that decode images.
        shard_items: images per shard.
        dtype: data type of stored latents. None means float16.
        moments: also store the standard deviations of the posteriors, for sampling.
        value_range: the numbers that files store for black and white, as in training. Files of
            floats need this argument if the model is grey or RGBA. Files of signed 8-bit numbers
            always need this argument.
        ignore_icc: use the stored numbers of files with an embedded colour profile. By default
            these files are converted to sRGB.
        max_pixels: largest number of pixels of an image that is read (`data.set_pixel_limit`).
        all_pages: make every page of a TIFF a separate item. By default the first page is used.
        flip: mirror every image left to right.
        label_column: column of a table with the labels. None means the column `label`, if the table
            has this column.
        caption_column: column of a table with the captions. None means the column `text` or
            `caption`, if the table has one. See `latents.captions` for folders and tar files.
        overwrite: replace shards of another model, of other images or with other options. Only the
            names, labels and captions of the images are compared, not their pixels.
        optimize: option `optimize` of `load`, if `model` is a folder or a Hub id. The manifest
            records the mode of `optimize` that was used.
        variant: variant of the weights in a folder, such as `"fp16"`.
        model_name: path or Hub id that the manifest records for the model. By default, `model` if
            it is a path or Hub id, else the name of the `Autoencoder`.
        device: device of the model. None means the GPU of this rank, if there is one.

    Returns:
        The manifest, or None if other ranks are still working.

    Raises:
        UserError: an option is wrong or `out` holds shards of another encoding (checked before any
            image is read), no image can be read, or latents overflow `dtype`.
    """
    # open model and images
    out = Path(out).expanduser()
    rank, world_size = launched_rank()
    if batch_size < 1 or num_workers < 0:
        raise UserError(
            "batch_size must be at least 1 and num_workers at least 0 (got batch_size "
            f"{batch_size} and num_workers {num_workers})."
        )
    name = model_name or str(model.name if isinstance(model, Autoencoder) else model)
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
    size = check_resolution(model, resolution)
    transform = EvalTransform(size, interpolation=interpolation)
    labels = find_labels(source, label_column=label_column)
    captions = find_captions(source, caption_column=caption_column)

    # content of the shards
    content = describe(
        model,
        resolution=size,
        interpolation=interpolation,
        value_range=value_range,
        ignore_icc=ignore_icc,
        max_pixels=max_pixels,
        flip=flip,
        shard_items=shard_items,
        dtype=dtype,
        moments=moments,
        num_items=len(source),
        data_sha256=data_sha256(source, labels, captions),
        class_names=labels.class_names if labels else None,
        labels=labels is not None,
        captions=captions is not None,
    )

    # write this rank's missing shards, and the manifest if all shards exist
    mine = range(rank, content.num_shards, world_size)
    _prepare(out, content, overwrite=overwrite, rank=rank, world_size=world_size)
    write_shards(
        out,
        [shard for shard in mine if not shard_path(out, shard).exists()],
        Pictures(source, transform, flip=flip),
        model=model,
        content=content,
        labels=labels,
        captions=captions,
        batch_size=batch_size,
        num_workers=num_workers,
        progress=rank == 0,
    )
    return finish(out, content, model=name, data=given_name(data), rank=rank)


def _prepare(out: Path, content: Content, *, overwrite: bool, rank: int, world_size: int) -> None:
    """Create the folder, and remove those shards of this rank that must be written again.

    If the folder holds shards of another model, of other images or with other options, remove these
    shards with `overwrite`, and raise UserError without `overwrite`. Damaged shards are removed if
    there is a manifest or `overwrite` is set. Otherwise a damaged shard raises UserError, because
    the file could be something else than a shard.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{out}': {error.strerror}.") from error

    # what the folder holds already
    manifest = read_manifest(out) if (out / MANIFEST).exists() else None
    found = {path: read_header(path) for path in sorted(out.glob("shard-*.safetensors"))}
    if not overwrite:
        _refuse_others(out, content, manifest, found)
    same = any(header is not None and header.content == content for header in found.values())
    if overwrite and same and rank == 0:
        print(
            f"'{out}' already holds shards of this model and of images with the same names. "
            "Complete shards are kept, even with overwrite. Delete the folder if the images have "
            "changed."
        )

    # remove files of other encodings, and this rank's damaged shards
    if manifest is not None and manifest.content != content:
        (out / MANIFEST).unlink(missing_ok=True)
        manifest = None
    for path, header in found.items():
        number = path.stem.removeprefix("shard-")
        if not number.isdigit() or int(number) % world_size != rank:
            continue
        fits = header is not None and header.content == content and header.shard == int(number)
        if not (fits and _as_listed(out, int(number), manifest)):
            path.unlink(missing_ok=True)  # delete this file first: it marks the others as complete
            path.with_suffix(".parquet").unlink(missing_ok=True)
            (out / MANIFEST).unlink(missing_ok=True)
    sweep_temporary(out, rank=rank, world_size=world_size)


def _refuse_others(
    out: Path, content: Content, manifest: Manifest | None, found: dict[Path, ShardHeader | None]
) -> None:
    """Raise UserError for shards of another encoding, or for damaged ones if `manifest` is None."""
    others = [header.content for header in found.values() if header is not None]
    others += [manifest.content] if manifest is not None else []
    for other in others:
        if keys := ", ".join(other.differences(content)):
            raise UserError(
                f"'{out}' holds shards with another {keys}. Give another folder, or --overwrite."
            )
    strange = next((path for path, header in found.items() if header is None), None)
    if strange is not None and manifest is None:
        raise UserError(
            f"'{strange}' is damaged or not a shard of latentvae. Delete this file, or give "
            "another output folder."
        )


def _as_listed(out: Path, shard: int, manifest: Manifest | None) -> bool:
    """Return whether a shard's files match the manifest, or True if there is no manifest."""
    if manifest is None:
        return True
    if shard >= len(manifest.shards):
        return False
    listed, table = manifest.shards[shard], table_path(out, shard)
    if listed.table_sha256 is not None:
        if not table.is_file() or sha256_of(table) != listed.table_sha256:
            return False
    return sha256_of(shard_path(out, shard)) == listed.sha256
