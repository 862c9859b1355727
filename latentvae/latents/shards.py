"""The one format of cached latents and tokens: safetensors files of equal length and a manifest.

    DIR/shard-00000.safetensors   items 0..n - 1 of the sorted source, with these tensors:
        indices (n, h, w) or (n, L, h, w)    tokens, in the smallest of uint8, uint16, int32
        latents (n, d, h, w), stds           or latents: posterior means and, if asked, deviations
        labels (n)                           int64, where the data has classes
        sizes (n, 2)                         height and width of the image before the transform
        ids, id_ends (n)                     names in UTF-8, one after the other, and their ends
    DIR/shard-00000.parquet       of tokens: the same rows as a table
    DIR/manifest.json             written last; without it the folder is not complete

Shard s holds the items s * shard_items and on, whoever writes it, less those that cannot be read.
Every file is written under another name, synced and renamed, so a file that is there is whole; a
shard's header says what it belongs to. The bytes depend on the content alone.

`n` items, `L` levels of a residual tokenizer, `d` latent channels, `h w` latent positions, `K`
codes.
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
HEADER_KEY = "latentvae"  # one key alone: safetensors writes several in no fixed order
DTYPES = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int32": torch.int32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
TOKEN_ORDER = (
    "row-major: indices[y, x] is the code of row y (top first) and column x (left first); "
    "of L levels indices[level, y, x], coarsest level first"
)
LATENT_ORDER = "latents[channel, y, x], row y from the top, column x from the left; not scaled"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Normalization(_Strict):
    """How a diffusion model sees the latents: (z - mean) * scale, after folding; see
    `models.normalization`."""

    mean: list[float]
    scale: list[float]
    fold: int = Field(ge=1)


class Content(_Strict):
    """All that the bytes of the shards follow from.

    Attributes:
        item_shape: (h, w) or (L, h, w) of tokens, (d, h, w) of latents.
        order: what the dimensions are, in words.
        num_codes: K, of tokens.
        moments: latents come with the posterior's standard deviations.
        image_channels, value_range: what every image became; see `data.PixelFormat`.
        data_sha256: of the sorted names and the labels, not of the pictures.
        shard_items: items of the source a shard.
        optimize: what computed in the model's place, see `compute.optimization`; None is itself.
    """

    format_version: Literal[1] = 1
    kind: Literal["tokens", "latents"]
    dtype: Literal["uint8", "uint16", "int32", "float16", "bfloat16", "float32"]
    item_shape: tuple[int, ...]
    order: str
    num_codes: int | None = Field(default=None, ge=1)
    moments: bool = False
    normalization: Normalization | None = None
    model_class: str
    model_sha256: str
    f: int = Field(ge=1)
    image_channels: int = 3
    value_range: tuple[float, float] | None = None
    resolution: int = Field(ge=1)
    interpolation: str
    crop: Literal["center"] = "center"
    num_source_items: int = Field(ge=1)
    data_sha256: str
    labels: bool
    class_names: list[str] | None = None
    shard_items: int = Field(ge=1)
    optimize: Literal["exact", "fast", "openvino"] | None = None

    @property
    def num_shards(self) -> int:
        return -(-self.num_source_items // self.shard_items)

    @property
    def payload(self) -> str:
        """Name of the tensor that matters."""
        return "indices" if self.kind == "tokens" else "latents"

    def items_of(self, shard: int) -> range:
        """Which items of the source a shard is made from."""
        start = shard * self.shard_items
        return range(start, min(start + self.shard_items, self.num_source_items))

    def differences(self, other: "Content") -> list[str]:
        """Names of what differs."""
        return [name for name, value in self if getattr(other, name) != value]


class ShardHeader(_Strict):
    """What a shard's own header says.

    Attributes:
        unreadable: (name, reason) of the items that are left out.
    """

    content: Content
    shard: int
    unreadable: list[tuple[str, str]]


class ShardFile(_Strict):
    """A shard in the manifest; `table_sha256` is that of its parquet file."""

    items: int = Field(ge=0, lt=2**48)
    sha256: str
    table_sha256: str | None = None


class Manifest(_Strict):
    """manifest.json.

    Attributes:
        model, data: as they were given; where the model is sought when decoding.
        statistics: of tokens usage, perplexity and bits; of latents mean and deviation.
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
    """The smallest type that holds 0..K - 1."""
    if num_codes > 2**31:
        raise UserError(f"tokens of at most {2**31} codes can be stored, not of {num_codes}")
    return "uint8" if num_codes <= 2**8 else "uint16" if num_codes <= 2**16 else "int32"


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def table_path(folder: Path, shard: int) -> Path:
    return shard_path(folder, shard).with_suffix(".parquet")


def shard_bytes(tensors: Mapping[str, Tensor], header: ShardHeader) -> bytes:
    """The file of a shard: the same bytes for the same content."""
    whole = {name: value.contiguous() for name, value in tensors.items()}
    return safetensors.torch.save(whole, metadata={HEADER_KEY: header.model_dump_json()})


def read_header(path: Path) -> ShardHeader | None:
    """The header of a whole shard; None if there is no such file, or it is cut short or another."""
    if not path.is_file():  # opening a pipe would wait for a writer
        return None
    try:
        with safe_open(path, "pt") as file:
            return ShardHeader.model_validate_json((file.metadata() or {}).get(HEADER_KEY, ""))
    except (OSError, SafetensorError, ValidationError):
        return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete folder.

    Raises:
        UserError: no shards, an encoding that has not ended, or a manifest of something else.
    """
    path = folder / MANIFEST
    if not path.exists():
        found = len(list(folder.glob("shard-*.safetensors")))
        text = (
            f"'{folder}' has {found} shards but no {MANIFEST}: its encoding has not ended; the "
            "same `latentvae encode` command goes on with it"
            if found
            else f"'{folder}' is no folder of shards: it has no {MANIFEST}"
        )
        raise UserError(text)
    text = read_text(path)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"'{path}' is not the manifest of shards of latentvae") from error
    if manifest.num_items != sum(shard.items for shard in manifest.shards):
        raise UserError(
            f"'{path}' is damaged: its shards do not hold its {manifest.num_items} items"
        )
    return manifest


def write_file(path: Path, data: bytes, *, owner: int) -> None:
    """Write a file that is there whole or not at all.

    Args:
        owner: a number in the temporary name; see `sweep_temporary`.
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
    """Delete what killed ranks left, but for that of ranks at work.

    A shard's temporary files carry its number, other ones the rank's; rank r writes none but with
    numbers r, r + W, r + 2W...
    """
    for path in folder.glob("*.part-*"):
        owner = path.name.rpartition("-")[2]
        if owner.isdigit() and int(owner) % world_size == rank:
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack_names(names: Sequence[str]) -> dict[str, Tensor]:
    """`ids`, uint8, and `id_ends`, int64 (n)."""
    encoded = [name.encode(errors="surrogateescape") for name in names]
    joined = bytearray(b"".join(encoded))
    ids = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.zeros(0).byte()
    lengths = torch.tensor([len(name) for name in encoded], dtype=torch.int64)
    return {"ids": ids, "id_ends": lengths.cumsum(0)}
