"""Decode shards (files) of tokens or latents to one PNG per image (`latentvae decode`).

Pictures have 8 bits per channel and as many channels as the model's images. With W processes, the
process of rank r decodes the batches r, r + W, r + 2W and so on. A batch whose pictures all exist
is skipped, so the same command continues a decoding that was killed.
"""

import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from latentvae.autoencoder import Autoencoder
from latentvae.compute.optimization import Optimize
from latentvae.compute.precision import full_float32
from latentvae.data.image_folder import inner_name
from latentvae.distributed import launched_rank
from latentvae.errors import UserError, printable
from latentvae.files import read_text
from latentvae.latents.formats.shards import MANIFEST, sha256_of, write_file
from latentvae.latents.opening import open_model
from latentvae.latents.shard_dataset import ShardReader
from latentvae.pictures import to_pil

RECORD = "decoded.json"
MAX_PART = 200  # largest number of bytes in a name, so that temporary files can add a suffix


class Decoded(BaseModel):
    """The content of decoded.json: which shards were decoded, and with which settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: str
    manifest_sha256: str
    optimize: str | None = None


@full_float32()
def decode_folder(
    shards: str | Path,
    out: str | Path,
    *,
    model: Autoencoder | str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    optimize: Optimize | None = None,
    variant: str | None = None,
    device: str | None = None,
) -> list[Path]:
    """Decode the images in a folder of shards, and write each image as a PNG below `out`.

    `picture_names` makes the names of the PNG files from the names of the encoded images.

    Args:
        shards: a folder that `encode_folder` wrote. First, each file is checked by its sha256.
        model: the autoencoder, or its folder or Hub id. With None, the function loads the model
            that manifest.json in the folder `shards` names.
        limit: decode only the first `limit` encoded images.
        batch_size: images per forward pass.
        optimize: option `optimize` of `load`, if `model` is not an `Autoencoder`.
        variant: variant of the weights in a folder, such as `"fp16"`.
        device: device of the model. None means the GPU of this rank, if there is one.

    Returns:
        The paths of this rank's pictures, in the order of the encoded images. Pictures that existed
        before the call are included.

    Raises:
        UserError: shards are damaged, tokens are out of range, or `model` did not make the
            shards. The error also occurs if `out` holds pictures of other shards, pictures of
            another mode of `optimize`, or other files with the names of the pictures. These
            conditions are checked before the first image is decoded.
    """
    out, (rank, world_size) = Path(out).expanduser(), launched_rank()
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(
            f"batch_size and limit must be at least 1 (got batch_size {batch_size} and "
            f"limit {limit})."
        )

    # check everything before the first picture
    reader = ShardReader(shards)
    reader.verify()
    count = min(len(reader), limit or len(reader))
    reader.check()
    paths = [out / name for name in picture_names(reader.names())[:count]]
    network = _fitting_model(reader, model, device=device, optimize=optimize, variant=variant)
    _prepare(out, paths, reader, rank=rank, mode=network.optimization.mode)

    # this rank's batches
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    mine = batches[rank::world_size]
    for batch in tqdm(mine, desc=network.name, unit="batch", disable=None if rank == 0 else True):
        if not all(paths[index].exists() for index in batch):
            _write_pictures(reader, network, batch, paths)
    return [paths[index] for batch in mine for index in batch]


def picture_names(names: Sequence[str]) -> list[str]:
    """Return a relative PNG path for each image's name.

    All paths differ and stay in the output folder.
    """
    inner = [_on_disk(inner_name(name.replace("\\", "/"))) or "item" for name in names]
    stems = [PurePosixPath(name).with_suffix("").as_posix() for name in inner]
    times, taken, result = Counter(stems), set[str](), list[str]()
    for name, stem in zip(inner, stems, strict=True):
        base = stem if times[stem] == 1 else name  # a.jpg and a.png need different names
        candidate, number = base, 1
        while candidate in taken:
            number += 1
            candidate = f"{base}-{number}"
        taken.add(candidate)
        result.append(f"{candidate}.png")
    return result


def _on_disk(name: str) -> str:
    """Convert a name for any file system: escape control characters and shorten long parts."""
    escaped = "".join(printable(c) if unicodedata.category(c) == "Cc" else c for c in name)
    return "/".join(map(_short, escaped.replace("\\", "_").split("/")))


def _short(part: str) -> str:
    """Shorten a part of a path to `MAX_PART` bytes. An added hash keeps long parts different."""
    data = os.fsencode(part)
    if len(data) <= MAX_PART:
        return part
    digest = hashlib.sha256(data).hexdigest()[:16]
    return f"{data[: MAX_PART - 17].decode(errors='ignore')}-{digest}"


def _fitting_model(
    reader: ShardReader,
    model: Autoencoder | str | Path | None,
    *,
    device: str | None,
    optimize: Optimize | None,
    variant: str | None,
) -> Autoencoder:
    """Load the model, and raise UserError if this model did not make the shards."""
    content = reader.content
    if not isinstance(model, Autoencoder):
        try:
            path = model or reader.manifest.model
            model = open_model(path, device=device, optimize=optimize, variant=variant)
        except UserError as error:
            if model is not None:
                raise
            raise UserError(
                f"{error} (The manifest names this model. Give another model with --model.)"
            ) from error

    # the same codes and the same weights
    if model.num_codes != content.num_codes:
        has, needs = (
            "continuous latents" if codes is None else f"{codes} codes"
            for codes in (model.num_codes, content.num_codes)
        )
        raise UserError(
            f"'{reader.folder}' was encoded by a model with {needs}, but '{model.name}' has {has}. "
            f"Give the model that encoded the folder ('{reader.manifest.model}')."
        )
    if model.info()["weights_sha256"] != content.model_sha256:
        raise UserError(
            f"'{model.name}' has other weights than the model that encoded '{reader.folder}'. "
            f"Give the model that encoded the folder ('{reader.manifest.model}')."
        )
    return model


def _prepare(
    out: Path, paths: Sequence[Path], reader: ShardReader, *, rank: int, mode: str
) -> None:
    """Create the folder of the pictures, and record in decoded.json which shards are decoded."""
    record = Decoded(
        shards=str(reader.folder),
        manifest_sha256=sha256_of(reader.folder / MANIFEST),
        optimize=None if mode == "stock" else mode,
    )
    path = out / RECORD

    # what the folder holds already
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Another rank writes the record before its first picture, so look for pictures first.
        there = None if path.exists() else next((p for p in paths if p.exists()), None)
        found = Decoded.model_validate_json(read_text(path)) if path.exists() else None
    except OSError as error:
        raise UserError(f"cannot use the folder '{out}': {error.strerror}.") from error
    except ValidationError as error:
        raise UserError(
            f"'{path}' was not written by `latentvae decode`. Give another folder."
        ) from error
    if found is None and there is not None:
        raise UserError(
            f"'{there}' exists, and `latentvae decode` did not write it. Give another folder."
        )
    if found is not None:
        _refuse_other_pictures(out, found, record)

    write_file(path, record.model_dump_json(indent=1).encode(), owner=rank)


def _refuse_other_pictures(out: Path, found: Decoded, record: Decoded) -> None:
    if found.manifest_sha256 != record.manifest_sha256:
        raise UserError(
            f"'{out}' holds pictures of other shards ('{found.shards}'). Give another folder."
        )
    if found.optimize != record.optimize:
        raise UserError(
            f"'{out}' holds pictures decoded with optimize {found.optimize} "
            f"(now {record.optimize}). Give another folder, or the same optimize."
        )


def _write_pictures(
    reader: ShardReader, model: Autoencoder, batch: range, paths: Sequence[Path]
) -> None:
    size = reader.content.size
    stored = torch.stack([reader.payload(index) for index in batch])
    if reader.content.kind == "tokens":
        images = model.decode_tokens(stored.long(), size=size)
    else:
        images = model.decode(stored.float(), size=size)
    assert isinstance(images, torch.Tensor)
    for index, picture in zip(batch, to_pil(images), strict=True):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        paths[index].parent.mkdir(parents=True, exist_ok=True)
        write_file(paths[index], buffer.getvalue(), owner=index)
