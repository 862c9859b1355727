"""Finish an encoding: write manifest.json, with statistics of the tokens or latents.

Apart from the names of the model and the data, the manifest is computed only from the shards. So
every rank and every continued encoding writes the same manifest.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from latentvae.coding.token_codec import MAX_CODES, encode_levels, encode_tokens
from latentvae.errors import UserError
from latentvae.latents import LatentStatistics
from latentvae.latents.formats.shard_parquet import CARD
from latentvae.latents.formats.shards import (
    MANIFEST,
    Content,
    Manifest,
    ShardFile,
    ShardHeader,
    read_header,
    read_manifest,
    sha256_of,
    shard_path,
    table_path,
    write_file,
)
from latentvae.metrics.tokens import TokenUsage
from latentvae.models.levels import split_levels

CODED_IMAGES = 64  # number of images, evenly spread, whose coded size is measured


class NothingReadable(UserError):
    """Raised if no image of an encoding can be read."""


def finish(out: Path, content: Content, *, model: str, data: str, rank: int) -> Manifest | None:
    """Write the manifest of an encoding and return it, or return None if a shard is missing.

    Raises:
        UserError: no image could be read.
    """
    # all shards complete?
    headers = [read_header(shard_path(out, shard)) for shard in range(content.num_shards)]
    whole = [h for h in headers if h is not None and h.content == content]
    if len(whole) < content.num_shards:
        return None
    if (out / MANIFEST).exists():
        return read_manifest(out)

    # the manifest
    manifest = _manifest(out, whole, model=model, data=data)
    if manifest.num_items == 0:
        name, reason = manifest.unreadable[0]
        raise NothingReadable(
            f"none of the {len(manifest.unreadable)} images can be read, for example '{name}': "
            f"{reason}"
        )

    # write it last: it marks the folder as complete
    if content.kind == "tokens":
        write_file(out / "README.md", CARD.encode(), owner=rank)
    text = manifest.model_dump_json(indent=1) + "\n"
    write_file(out / MANIFEST, text.encode(), owner=rank)
    return manifest


def _manifest(out: Path, headers: list[ShardHeader], *, model: str, data: str) -> Manifest:
    content = headers[0].content
    tokens = content.kind == "tokens"
    counts = [len(load_shard(out, header.shard)) for header in headers]
    files = [
        ShardFile(
            items=count,
            sha256=sha256_of(shard_path(out, header.shard)),
            table_sha256=sha256_of(table_path(out, header.shard)) if tokens and count else None,
        )
        for header, count in zip(headers, counts, strict=True)
    ]
    measure = _token_statistics if tokens else _latent_statistics
    return Manifest(
        model=model,
        data=data,
        num_items=sum(counts),
        content=content,
        statistics=measure(out, content, counts) if sum(counts) else {},
        unreadable=[entry for header in headers for entry in header.unreadable],
        shards=files,
    )


def load_shard(out: Path, shard: int) -> Tensor:
    """Return the tokens or latents of a shard, (n, ...)."""
    tensors = load_file(shard_path(out, shard))
    return tensors["indices"] if "indices" in tensors else tensors["latents"]


def _token_statistics(out: Path, content: Content, counts: list[int]) -> dict[str, Any]:
    """Return usage statistics of the codes, and bits per pixel without and with entropy coding.

    If the tokens have levels of several sizes, the key `levels` has the same statistics for each
    level, coarsest first.
    """
    assert content.num_codes is not None

    # pass over all shards
    parts = 1 if content.levels is None else len(content.levels)
    usage, total, first = TokenUsage(content.num_codes, codebooks=parts), sum(counts), 0
    chosen = {i * total // CODED_IMAGES for i in range(CODED_IMAGES)} if total else set[int]()
    coded: list[list[int]] = []
    for shard, count in enumerate(counts):
        indices = _by_level(load_shard(out, shard).long(), content)
        usage.update(indices)
        rows = [item - first for item in sorted(chosen) if first <= item < first + count]
        if content.num_codes <= MAX_CODES:
            coded += [_coded_bits([own[row] for own in indices], content) for row in rows]
        first += count

    # bits per pixel
    report: dict[str, Any] = dict(usage.result())
    _add_bits(report, math.prod(content.item_shape), content, coded=[bits[0] for bits in coded])
    for place, level in enumerate(content.levels or ()):
        own = [bits[1 + place] for bits in coded]
        _add_bits(report["levels"][place], math.prod(level), content, coded=own)
    return _rounded(report)


def _by_level(indices: Tensor, content: Content) -> list[Tensor]:
    return [indices] if content.levels is None else split_levels(indices, content.levels)


def _add_bits(
    report: dict[str, Any], tokens: int, content: Content, *, coded: Sequence[int]
) -> None:
    """Add the bits per pixel of an image's raw tokens and of its entropy-coded file to a report.

    `tokens` is the number of tokens of an image, and `coded` lists the sizes of some coded files in
    bits.
    """
    pixels = math.prod(content.size)
    report["raw_bpp"] = tokens * math.log2(content.num_codes or 1) / pixels
    if coded:
        report["coded_bpp"] = sum(coded) / len(coded) / pixels
        report["coded_images"] = len(coded)


def _coded_bits(levels: Sequence[Tensor], content: Content) -> list[int]:
    """Return the size of an image's entropy-coded file in bits, as a list of one number.

    If the tokens have levels of several sizes, the size of a coded file of each level follows.
    """
    assert content.num_codes is not None
    num_codes, maps = content.num_codes, [level.numpy() for level in levels]
    files = [encode_tokens(level, num_codes=num_codes) for level in maps]
    if content.levels is not None:
        files.insert(0, encode_levels(maps, num_codes=num_codes))
    return [8 * len(file) for file in files]


def _latent_statistics(out: Path, content: Content, counts: list[int]) -> dict[str, Any]:
    """Return mean and standard deviation of the stored latents, before scaling."""
    statistics = LatentStatistics()
    for shard, count in enumerate(counts):
        if count:
            latents = load_shard(out, shard)
            for batch in latents.split(256):  # a float64 copy of a complete shard is large
                statistics.update(batch)
    if math.prod(statistics.channel_mean.shape) == 0:
        return {}
    return {
        "mean": _rounded(statistics.mean),
        "std": _rounded(statistics.std),
        "channel_mean": _rounded(statistics.channel_mean),
        "channel_std": _rounded(statistics.channel_std),
    }


def _rounded(value: Any) -> Any:
    """Round floats to nine significant digits, because threads may change a sum's last digits."""
    if isinstance(value, torch.Tensor):
        return _rounded(value.tolist())
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
