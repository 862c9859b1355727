"""`latentvae encode`: every image of a set through an encoder once, into shards.

Rank r of W writes the shards r, r + W, r + 2W... that are not there yet; batches do not reach over
a shard's end. So the files depend neither on the number of ranks nor on when a run was killed, and
the same command again writes what is missing. Ranks need not talk: whichever sees all shards
complete writes the manifest, and it is the same whoever does.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from latentvae.autoencoder import Autoencoder, load
from latentvae.caching.describe import describe
from latentvae.caching.finish import finish
from latentvae.caching.items import (
    Labels,
    Picture,
    Pictures,
    data_sha256,
    find_labels,
    open_items,
)
from latentvae.data import DatasetSpec, EvalTransform
from latentvae.distributed import launched_device, launched_rank
from latentvae.errors import UserError
from latentvae.latents.shard_table import table_bytes
from latentvae.latents.shards import (
    DTYPES,
    MANIFEST,
    Content,
    Manifest,
    ShardHeader,
    pack_names,
    read_header,
    read_manifest,
    sha256_of,
    shard_bytes,
    shard_path,
    sweep_temporary,
    table_path,
    write_file,
)


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
    label_column: str | None = None,
    overwrite: bool = False,
    device: str | None = None,
) -> Manifest | None:
    """Write the tokens (of a tokenizer) or latents of all images into `out`; see `latents.shards`.

    The shorter side of an image is resized to `resolution`, enlarged where it is smaller, and the
    centre cropped. An image that cannot be read is left out and named in the manifest.

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
        label_column: of a table; None takes `label`, if it is there.
        overwrite: replace shards of another model or other data.
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
    source, transform = open_items(data), EvalTransform(resolution, interpolation=interpolation)
    labels = find_labels(source, label_column=label_column)
    name = str(model.name if isinstance(model, Autoencoder) else model)
    if not isinstance(model, Autoencoder):
        model = load(model, device=device or launched_device())
    content = describe(
        model,
        resolution=resolution,
        interpolation=interpolation,
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
    missing = [shard for shard in mine if not shard_path(out, shard).exists()]
    pictures = _read(Pictures(source, transform), content, missing, batch_size, num_workers)
    total = sum(len(content.items_of(shard)) for shard in missing)
    with tqdm(
        total=total, desc=model.name, unit="image", disable=None if rank == 0 else True
    ) as bar:
        for shard in missing:
            count = -(-len(content.items_of(shard)) // batch_size)
            batches = (_counted(batch, bar) for batch in itertools.islice(pictures, count))
            _write_shard(out, shard, batches, model=model, content=content, labels=labels)
    given = data.name if isinstance(data, DatasetSpec) else os.fspath(data)
    return finish(out, content, model=name, data=given, rank=rank)


def _prepare(out: Path, content: Content, *, overwrite: bool, rank: int, world_size: int) -> None:
    """Make the folder; refuse or remove what is of something else, remove what is damaged."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{out}': {error.strerror}") from error
    manifest = read_manifest(out) if (out / MANIFEST).exists() else None
    numbers = sorted(int(path.stem[6:]) for path in out.glob("shard-*.safetensors"))
    headers = {number: read_header(shard_path(out, number)) for number in numbers}
    others = [header.content for header in headers.values() if header is not None]
    others += [manifest.content] if manifest is not None else []
    different = next((other for other in others if other != content), None)
    if different is not None and not overwrite:
        keys = ", ".join(different.differences(content))
        raise UserError(
            f"'{out}' holds shards with another {keys}: give another folder, or --overwrite"
        )
    if manifest is not None and manifest.content != content:
        (out / MANIFEST).unlink(missing_ok=True)
        manifest = None
    for number in numbers:
        header = headers[number]
        whole = header is not None and header.content == content and header.shard == number
        if number % world_size == rank and not (whole and _as_listed(out, number, manifest)):
            shard_path(out, number).unlink(missing_ok=True)  # first: it tells that all is not there
            table_path(out, number).unlink(missing_ok=True)
            (out / MANIFEST).unlink(missing_ok=True)
    sweep_temporary(out, rank=rank, world_size=world_size)


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


def _read(
    pictures: Pictures, content: Content, shards: Sequence[int], batch_size: int, num_workers: int
) -> Iterator[list[Picture]]:
    """Batches of the shards, one shard after the other."""
    batches = [
        list(items[start : start + batch_size])
        for items in map(content.items_of, shards)
        for start in range(0, len(items), batch_size)
    ]
    loader = DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # else iter() draws from the global generator
    )
    return iter(loader)


def _counted(batch: list[Picture], bar: Any) -> list[Picture]:
    bar.update(len(batch))
    return batch


def _write_shard(
    out: Path,
    shard: int,
    batches: Iterator[list[Picture]],
    *,
    model: Autoencoder,
    content: Content,
    labels: Labels | None,
) -> None:
    read: list[Picture] = []
    unreadable: list[tuple[str, str]] = []
    encoded: list[dict[str, Tensor]] = []
    for batch in batches:
        unreadable += [(_printable(p.name), p.reason) for p in batch if p.image is None]
        read += [p._replace(image=None) for p in batch if p.image is not None]
        if images := [p.image for p in batch if p.image is not None]:
            encoded.append(_encode(model, torch.stack(images), content))
    names = [p.name for p in read]
    tensors = _joined(encoded, content)
    tensors["sizes"] = torch.tensor([p.size for p in read], dtype=torch.int32).reshape(-1, 2)
    tensors.update(pack_names(names))
    if labels is not None:
        values = [labels.values[p.number] for p in read]
        tensors["labels"] = torch.tensor(values, dtype=torch.int64)
    if content.kind == "tokens" and names:  # `datasets` cannot read a table without rows
        table = table_bytes(tensors["indices"], names=names, labels=tensors.get("labels"))
        write_file(table_path(out, shard), table, owner=shard)
    header = ShardHeader(content=content, shard=shard, unreadable=unreadable)
    write_file(shard_path(out, shard), shard_bytes(tensors, header), owner=shard)


def _encode(model: Autoencoder, images: Tensor, content: Content) -> dict[str, Tensor]:
    """What is stored of images (b, 3, R, R), on the CPU."""
    dtype = DTYPES[content.dtype]
    if content.num_codes is not None:
        indices = model.encode_tokens(images).cpu()
        assert 0 <= int(indices.min()) and int(indices.max()) < content.num_codes
        return {"indices": indices.to(dtype)}
    mean, logvar = model.encode_posterior(images)
    tensors = {"latents": mean.cpu().to(dtype)}
    if content.moments:
        assert logvar is not None
        tensors["stds"] = (logvar.float() / 2).exp().cpu().to(dtype)
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UserError(
            f"latents of '{model.name}' are not finite in {content.dtype}; "
            + (
                "its weights or images are at fault"
                if content.dtype == "float32"
                else "try float32"
            )
        )
    return tensors


def _joined(encoded: Sequence[dict[str, Tensor]], content: Content) -> dict[str, Tensor]:
    """All batches; without one, tensors of no items."""
    if encoded:
        return {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
    names = [content.payload, *(["stds"] if content.moments else [])]
    empty = torch.zeros(0, *content.item_shape).to(DTYPES[content.dtype])
    return {name: empty.clone() for name in names}


def _printable(name: str) -> str:
    """A name that JSON can hold: file names need not be UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
