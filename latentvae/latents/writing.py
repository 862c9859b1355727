"""Encode images and write the files of their shards."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from latentvae.autoencoder import Autoencoder
from latentvae.data.workers import explained_workers
from latentvae.errors import UserError
from latentvae.latents.formats.shard_parquet import table_bytes
from latentvae.latents.formats.shards import (
    DTYPES,
    Content,
    ShardHeader,
    pack_texts,
    shard_bytes,
    shard_path,
    table_path,
    write_file,
)
from latentvae.latents.items import Labels, Picture, Pictures


def write_shards(
    out: Path,
    shards: Sequence[int],
    pictures: Pictures,
    *,
    model: Autoencoder,
    content: Content,
    labels: Labels | None,
    captions: Sequence[str] | None,
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> None:
    """Encode the items of the given shards, and write each shard once all its items are encoded."""
    # one stream of batches for all shards, so that workers never wait
    counts = {shard: -(-len(content.items_of(shard)) // batch_size) for shard in shards}
    bar = tqdm(
        _read(pictures, content, shards, batch_size, num_workers),
        total=sum(counts.values()),
        desc=model.name,
        unit="batch",
        disable=None if progress else True,  # None disables the bar where there is no terminal
    )

    # each shard takes its own batches
    batches = iter(bar)
    for shard, count in counts.items():
        own = itertools.islice(batches, count)
        _write_shard(
            out, shard, own, model=model, content=content, labels=labels, captions=captions
        )
    bar.close()


def _read(
    pictures: Pictures, content: Content, shards: Sequence[int], batch_size: int, num_workers: int
) -> Iterator[list[Picture]]:
    """Yield batches of images for the shards, one shard after the other."""
    batches = [
        list(items[start : start + batch_size])
        for items in map(content.items_of, shards)
        for start in range(0, len(items), batch_size)
    ]
    with explained_workers(num_workers):
        loader = DataLoader(
            pictures,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # by default, iter() draws from the global generator
        )
        return iter(loader)


def _write_shard(
    out: Path,
    shard: int,
    batches: Iterator[list[Picture]],
    *,
    model: Autoencoder,
    content: Content,
    labels: Labels | None,
    captions: Sequence[str] | None,
) -> None:
    """Encode the batches of one shard, and write its files."""
    read: list[Picture] = []
    unreadable: list[tuple[str, str]] = []
    encoded: list[dict[str, Tensor]] = []

    # encode
    for batch in batches:
        unreadable += [(_printable(p.name), p.reason) for p in batch if p.image is None]
        read += [p._replace(image=None) for p in batch if p.image is not None]
        if images := [p.image for p in batch if p.image is not None]:
            encoded.append(_encode(model, torch.stack(images), content))

    # tensors of all items
    tensors = _joined(encoded, content)
    tensors["sizes"] = torch.tensor([p.size for p in read], dtype=torch.int32).reshape(-1, 2)
    if labels is not None:
        values = [labels.values[p.number] for p in read]
        tensors["labels"] = torch.tensor(values, dtype=torch.int64)
    header = ShardHeader(content=content, shard=shard, unreadable=unreadable)
    texts = None if captions is None else [captions[p.number] for p in read]
    save_shard(out, header, tensors, names=[p.name for p in read], captions=texts)


def save_shard(
    out: Path,
    header: ShardHeader,
    tensors: dict[str, Tensor],
    *,
    names: Sequence[str],
    captions: Sequence[str] | None = None,
) -> None:
    """Write the files of a shard, the safetensors file last.

    Args:
        out: folder of the shards.
        header: the shard's header, which has the shard's number.
        tensors: the encoded items and their labels and sizes, as tensors by name.
        names: name of each item.
        captions: caption of each item, if the data has captions.
    """
    shard, content = header.shard, header.content
    if content.kind == "tokens" and names:  # `datasets` cannot read a table without rows.
        labels = tensors.get("labels")
        table = table_bytes(tensors["indices"], names=names, labels=labels, captions=captions)
        write_file(table_path(out, shard), table, owner=shard)

    texts = pack_texts(names, "id")
    if captions is not None:
        texts |= pack_texts(captions, "caption")
    data = shard_bytes({**tensors, **texts}, header)
    write_file(shard_path(out, shard), data, owner=shard)


def _encode(model: Autoencoder, images: Tensor, content: Content) -> dict[str, Tensor]:
    """Encode images (b, C, H, W), and return the tensors to store, on the CPU."""
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
        advice = "" if content.dtype == "float32" else " Use dtype float32."
        raise UserError(f"latents of '{model.name}' are not finite in {content.dtype}.{advice}")
    return tensors


def _joined(encoded: Sequence[dict[str, Tensor]], content: Content) -> dict[str, Tensor]:
    """Join the encoded batches of a shard. Without batches, return tensors with zero items."""
    if encoded:
        return {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
    names = [content.payload, *(["stds"] if content.moments else [])]
    empty = torch.zeros(0, *content.item_shape).to(DTYPES[content.dtype])
    return {name: empty.clone() for name in names}


def _printable(name: str) -> str:
    """Replace bytes that are not UTF-8 in a file name, because JSON cannot hold such bytes."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
