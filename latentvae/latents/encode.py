"""`latentvae encode`: every image of a set through an encoder once, into shards.

Rank r of W writes the shards r, r + W, r + 2W... that are not there yet; batches do not reach over
a shard's end. So the files depend neither on the number of ranks nor on when a run was killed, and
the same command again writes what is missing. Ranks need not talk: whichever sees all shards
complete writes the manifest, and it is the same whoever does.
"""

import os
from pathlib import Path
from typing import Literal

from latentvae.autoencoder import Autoencoder
from latentvae.compute.optimization import Optimize
from latentvae.data import DatasetSpec, EvalTransform, PixelFormat
from latentvae.distributed import launched_rank
from latentvae.errors import UserError
from latentvae.latents.describe import describe
from latentvae.latents.finishing import finish
from latentvae.latents.items import Pictures, data_sha256, find_labels, open_items
from latentvae.latents.opening import open_model
from latentvae.latents.shards import (
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
from latentvae.latents.writing import write_shards


def encode_folder(
    model: Autoencoder | str | Path,
    data: str | os.PathLike[str] | DatasetSpec,
    out: str | Path,
    *,
    resolution: int,
    batch_size: int = 16,
    num_workers: int = 0,
    shard_items: int = 4096,
    dtype: Literal["float16", "bfloat16", "float32"] | None = None,
    moments: bool = False,
    interpolation: str = "lanczos",
    value_range: tuple[float, float] | None = None,
    label_column: str | None = None,
    overwrite: bool = False,
    optimize: Optimize | None = None,
    device: str | None = None,
) -> Manifest | None:
    """Write the tokens (of a tokenizer) or latents of all images into `out`; see `latents.shards`.

    An image becomes what the model takes: grey, RGB or RGBA, of the depth its file has. Its shorter
    side is resized to `resolution`, enlarged where it is smaller, and the centre cropped. An image
    that cannot be read is left out and named in the manifest.

    Args:
        model: an autoencoder, or its folder or Hub id.
        data: what `data.open_source` takes, or the Hub's `owner/name`; of tables the training
            split.
        resolution: pixels a side, at least f.
        batch_size: images a forward pass. Another one may change the last digits of latents.
        num_workers: processes that decode images beside this one.
        shard_items: images a shard.
        dtype: of latents; None is float16.
        moments: latents come with the standard deviations of their posteriors, to sample from.
        value_range: stored numbers that become black and white, as in training; float files of a
            grey or RGBA model need it.
        label_column: of a table; None takes `label`, if it is there.
        overwrite: replace shards of another model or other data, which are told apart by the names
            and labels of the images, not by what is in them.
        optimize: of a folder or Hub id, as `load` takes it; the manifest holds what was used.
        device: None is the GPU of this rank, if there is one.

    Returns:
        The manifest; None where other ranks have not ended yet.

    Raises:
        UserError: before any image is read: something given is wrong, or `out` holds shards of
            something else. Afterwards: not one image can be read, or latents overflow `dtype`.
    """
    out = Path(out).expanduser()
    rank, world_size = launched_rank()
    if batch_size < 1 or num_workers < 0:
        raise UserError(
            f"batch_size {batch_size} and num_workers {num_workers} cannot be: 1 and 0 are least"
        )
    name = str(model.name if isinstance(model, Autoencoder) else model)
    if not isinstance(model, Autoencoder):
        model = open_model(model, device=device, optimize=optimize)
    source = open_items(data, pixels=PixelFormat(model.image_channels, value_range))
    transform = EvalTransform(resolution, interpolation=interpolation)
    labels = find_labels(source, label_column=label_column)
    content = describe(
        model,
        resolution=resolution,
        interpolation=interpolation,
        value_range=value_range,
        shard_items=shard_items,
        dtype=dtype,
        moments=moments,
        num_items=len(source),
        data_sha256=data_sha256(source, labels),
        class_names=labels.class_names if labels else None,
        labels=labels is not None,
    )
    mine = range(rank, content.num_shards, world_size)
    _prepare(out, content, overwrite=overwrite, rank=rank, world_size=world_size)
    write_shards(
        out,
        [shard for shard in mine if not shard_path(out, shard).exists()],
        Pictures(source, transform),
        model=model,
        content=content,
        labels=labels,
        batch_size=batch_size,
        num_workers=num_workers,
        progress=rank == 0,
    )
    given = data.name if isinstance(data, DatasetSpec) else os.fspath(data)
    return finish(out, content, model=name, data=given, rank=rank)


def _prepare(out: Path, content: Content, *, overwrite: bool, rank: int, world_size: int) -> None:
    """Make the folder; refuse or remove what is of something else, remove what is damaged."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{out}': {error.strerror}") from error
    manifest = read_manifest(out) if (out / MANIFEST).exists() else None
    found = {path: read_header(path) for path in sorted(out.glob("shard-*.safetensors"))}
    if not overwrite:
        _refuse_others(out, content, manifest, found)
    same = any(header is not None and header.content == content for header in found.values())
    if overwrite and same and rank == 0:
        print(
            f"'{out}' holds shards of this model and of images of these names: whole ones stay, "
            "overwrite or not; delete the folder if the images have changed"
        )
    if manifest is not None and manifest.content != content:
        (out / MANIFEST).unlink(missing_ok=True)
        manifest = None
    for path, header in found.items():
        number = path.stem.removeprefix("shard-")
        if not number.isdigit() or int(number) % world_size != rank:
            continue
        fits = header is not None and header.content == content and header.shard == int(number)
        if not (fits and _as_listed(out, int(number), manifest)):
            path.unlink(missing_ok=True)  # first: it tells that not all is there
            path.with_suffix(".parquet").unlink(missing_ok=True)
            (out / MANIFEST).unlink(missing_ok=True)
    sweep_temporary(out, rank=rank, world_size=world_size)


def _refuse_others(
    out: Path, content: Content, manifest: Manifest | None, found: dict[Path, ShardHeader | None]
) -> None:
    """Only a damaged shard that a manifest lists is ours without saying so."""
    others = [header.content for header in found.values() if header is not None]
    others += [manifest.content] if manifest is not None else []
    for other in others:
        if keys := ", ".join(other.differences(content)):
            raise UserError(
                f"'{out}' holds shards with another {keys}: give another folder, or --overwrite"
            )
    strange = next((path for path, header in found.items() if header is None), None)
    if strange is not None and manifest is None:
        raise UserError(
            f"'{strange}' is damaged or no shard of latentvae: delete it, or give another folder"
        )


def _as_listed(out: Path, shard: int, manifest: Manifest | None) -> bool:
    """Whether a shard's files are what the manifest says, if there is one."""
    if manifest is None:
        return True
    if shard >= len(manifest.shards):
        return False
    listed, table = manifest.shards[shard], table_path(out, shard)
    if listed.table_sha256 is not None:
        if not table.is_file() or sha256_of(table) != listed.table_sha256:
            return False
    return sha256_of(shard_path(out, shard)) == listed.sha256
