"""Read and write latentvae's format of latents and tokens: safetensors files and a manifest.

    DIR/shard-00000.safetensors   items 0..n - 1 of the sorted source
    DIR/shard-00000.parquet       for tokens: the same rows as a table
    DIR/manifest.json             written last, so it marks the folder as complete

A shard has these tensors:

    indices (n, h, w) or (n, L, h, w)   tokens, in the smallest of uint8, uint16, int32 that holds
                                        all tokens.
    latents (n, d, h, w)                or latents: posterior means.
    stds (n, d, h, w)                   with --moments: the posteriors' standard deviations.
    labels (n)                          int64, if the data has classes.
    captions, caption_ends (n)          texts, stored in the same way as names in `ids`, if the data
                                        has captions. An image without a caption has an empty text.
    sizes (n, 2)                        height and width of the image before the transform.
    ids, id_ends (n)                    names in UTF-8, one after the other, and the position in
                                        bytes at which each name ends.

Some tokenizers have levels of several sizes. `Content.levels` lists the sizes, and the module
`models.levels` describes the order of the tokens.

Shard s starts at item s * shard_items of the data and takes `shard_items` items. Items that cannot
be read are left out. Every file is written under a temporary name, synced and renamed, so a file
that exists is complete. A shard's header says to which encoding the shard belongs. The bytes of a
file depend only on what the file holds, not on when or by which process it was written.

Symbols: `n` items, `L` codes per position, `d` latent channels, `h w` latent positions,
`K` codes.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentvae.errors import UserError
from latentvae.files import read_text

MANIFEST = "manifest.json"
HEADER_KEY = "latentvae"  # only one key, because safetensors writes several keys in no fixed order
DTYPES = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int32": torch.int32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# These texts are part of a shard's header, and headers are compared. So if a text changes, old
# shards count as shards of another encoding.
TOKEN_ORDER = (
    "row-major: indices[y, x] is the code of row y (top first) and column x (left first); "
    "of L levels indices[level, y, x], coarsest level first"
)
LEVEL_ORDER = (
    "indices.reshape(-1) is one sequence of all levels: coarsest level first, each level row by "
    "row (top first) and from the left; `levels` lists the (h, w) of each level"
)
LATENT_ORDER = "latents[channel, y, x], row y from the top, column x from the left; not scaled"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Normalization(_Strict):
    """The normalisation of latents for a diffusion model: (z - mean) * scale.

    Before the normalisation, each square of `fold` x `fold` positions is folded into channels, see
    `models.normalization`.
    """

    mean: list[float]
    scale: list[float]
    fold: int = Field(ge=1)


class Content(_Strict):
    """Everything that determines the bytes of the shards (files of encoded images).

    Attributes:
        item_shape: (h, w) for tokens, (L, h, w) for L levels of tokens, or (d, h, w) for latents
            with d channels.
        order: the meaning of the dimensions of `item_shape`, in words.
        num_codes: number of codes K, for tokens. With `levels`, each level has its own K codes.
        levels: (h, w) of each level, coarsest first, if the levels of tokens have several sizes.
            The flattened tokens of an item are in the order of the levels. `levels` is None for
            latents, and for tokens whose levels all have the same size.
        moments: whether the shards also hold the posterior's standard deviations.
        image_channels, value_range, ignore_icc, max_pixels: format of every image,
            see `data.PixelFormat`.
        resolution: side of a square, or (height, width), in pixels.
        flip: whether the images were mirrored left to right.
        data_sha256: hash of the images' names, labels and captions, in the order of the images. The
            pixels are not hashed.
        shard_items: images of the data per shard, before unreadable images are left out.
        optimize: mode of `compute.optimization` with which the images were encoded, or None if the
            model was not optimized.
    """

    format_version: Literal[1] = 1
    kind: Literal["tokens", "latents"]
    dtype: Literal["uint8", "uint16", "int32", "float16", "bfloat16", "float32"]
    item_shape: tuple[int, ...]
    order: str
    num_codes: int | None = Field(default=None, ge=1)
    levels: tuple[tuple[int, int], ...] | None = None
    moments: bool = False
    normalization: Normalization | None = None
    model_class: str
    model_sha256: str
    f: int = Field(ge=1)
    image_channels: int = 3
    value_range: tuple[float, float] | None = None
    ignore_icc: bool = False
    max_pixels: int | None = None
    resolution: int | tuple[int, int]
    interpolation: str
    crop: Literal["center"] = "center"
    flip: bool = False
    num_source_items: int = Field(ge=1)
    data_sha256: str
    labels: bool
    class_names: list[str] | None = None
    captions: bool = False
    shard_items: int = Field(ge=1)
    optimize: Literal["exact", "fast", "openvino"] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the encoded images, in pixels."""
        side = self.resolution
        return (side, side) if isinstance(side, int) else side

    @property
    def num_shards(self) -> int:
        return -(-self.num_source_items // self.shard_items)

    @property
    def payload(self) -> str:
        """Name of the tensor that holds the items: tokens or latents."""
        return "indices" if self.kind == "tokens" else "latents"

    def items_of(self, shard: int) -> range:
        """Return the numbers of the source's items that belong to shard `shard`."""
        start = shard * self.shard_items
        return range(start, min(start + self.shard_items, self.num_source_items))

    def differences(self, other: "Content") -> list[str]:
        """Return the names of the fields in which this content and another one differ."""
        return [name for name, value in self if getattr(other, name) != value]


class ShardHeader(_Strict):
    """The header of a shard: the `Content` of its encoding, its number and its unreadable items.

    Attributes:
        unreadable: (name, reason) of the items that could not be read.
    """

    content: Content
    shard: int
    unreadable: list[tuple[str, str]]


class ShardFile(_Strict):
    """A shard's entry in the manifest. `table_sha256` is the hash of the shard's parquet file."""

    items: int = Field(ge=0, lt=2**48)
    sha256: str
    table_sha256: str | None = None


class Manifest(_Strict):
    """The content of manifest.json.

    Attributes:
        model, data: the model and the data as they were given to `encode`. By default, `decode`
            opens the model that `encode` used.
        statistics: usage, perplexity and bits of tokens, or mean and standard deviation of latents.
    """

    format: Literal["latentvae-shards"] = "latentvae-shards"
    model: str
    data: str
    num_items: int = Field(ge=0)
    content: Content
    statistics: dict[str, Any]
    unreadable: list[tuple[str, str]]
    shards: list[ShardFile]


def index_dtype(num_codes: int) -> Literal["uint8", "uint16", "int32"]:
    """Return the smallest integer type that holds the tokens 0..K - 1."""
    if num_codes > 2**31:
        raise UserError(
            f"tokens can only be stored if there are at most {2**31} codes (got {num_codes})."
        )
    return "uint8" if num_codes <= 2**8 else "uint16" if num_codes <= 2**16 else "int32"


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def table_path(folder: Path, shard: int) -> Path:
    return shard_path(folder, shard).with_suffix(".parquet")


def shard_bytes(tensors: Mapping[str, Tensor], header: ShardHeader) -> bytes:
    """Return the bytes of a shard's file. The same content always gives the same bytes."""
    whole = {name: value.contiguous() for name, value in tensors.items()}
    return safetensors.torch.save(whole, metadata={HEADER_KEY: header.model_dump_json()})


def read_header(path: Path) -> ShardHeader | None:
    """Return the header of a shard, or None if the shard's file is missing or damaged."""
    if not path.is_file():  # opening a pipe would wait for a writer
        return None
    try:
        with safe_open(path, "pt") as file:
            return ShardHeader.model_validate_json((file.metadata() or {}).get(HEADER_KEY, ""))
    except (OSError, SafetensorError, ValidationError):
        return None


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder of shards whose encoding is complete.

    Raises:
        UserError: there are no shards, the encoding is not complete, the manifest is damaged, or
            `latentvae encode` did not write the manifest.
    """
    # a folder without a manifest is not complete
    path = folder / MANIFEST
    if not path.exists():
        found = len(list(folder.glob("shard-*.safetensors")))
        text = (
            f"'{folder}' has {found} shards but no {MANIFEST}: its encoding is not complete. Run "
            "the same `latentvae encode` command again to continue it."
            if found
            else f"'{folder}' is not a folder of shards: it has no {MANIFEST}. "
            "`latentvae encode` writes folders of shards."
        )
        raise UserError(text)

    # read and check
    text = read_text(path)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"'{path}' is not a manifest that `latentvae encode` wrote.") from error
    if manifest.num_items != sum(shard.items for shard in manifest.shards):
        raise UserError(
            f"'{path}' is damaged: the numbers of items of its shards do not add up to num_items "
            f"{manifest.num_items}. Encode again."
        )
    return manifest


def write_file(path: Path, data: bytes, *, owner: int) -> None:
    """Write a file completely or not at all.

    Args:
        owner: the number at the end of the temporary file's name, see `sweep_temporary`.
    """
    temporary = path.with_name(f"{path.name}.part-{owner}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep_temporary(folder: Path, *, rank: int, world_size: int) -> None:
    """Delete temporary files that a killed process of this rank left.

    The name of a shard's temporary file ends with the shard's number. The name of any other
    temporary file ends with the rank. So rank r of W deletes the files with numbers r, r + W,
    r + 2W and so on. The files of other ranks, which may still be running, are not touched.
    """
    for path in folder.glob("*.part-*"):
        owner = path.name.rpartition("-")[2]
        if owner.isdigit() and int(owner) % world_size == rank:
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack_texts(texts: Sequence[str], kind: Literal["id", "caption"]) -> dict[str, Tensor]:
    """Encode texts as two tensors of a shard, such as `ids` (uint8) and `id_ends` (int64, (n))."""
    encoded = [text.encode(errors="surrogateescape") for text in texts]
    joined = bytearray(b"".join(encoded))
    data = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.zeros(0).byte()
    lengths = torch.tensor([len(text) for text in encoded], dtype=torch.int64)
    return {f"{kind}s": data, f"{kind}_ends": lengths.cumsum(0)}
