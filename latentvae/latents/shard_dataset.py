"""Read encoded tokens and latents as PyTorch data sets, item by item.

    tokens = TokenDataset("tokens")
    tokens[0]      # {"indices": int64 (h, w), "id": "cats/001.jpg", "label": 3}
    latents = LatentDataset("latents", scaled=True)
    latents[0]     # {"latent": float32 (d, h, w), "id": ..., "label": ...}

Symbols: `h w` latent positions, `L` codes per position, `d` latent channels, `K` codes.
"""

import os
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from latentvae.errors import UserError
from latentvae.latents.formats.shards import (
    DTYPES,
    read_manifest,
    sha256_of,
    shard_path,
    table_path,
)
from latentvae.models.normalization import LatentNormalization

MAX_OPEN = 64  # largest number of shards that a process keeps memory-mapped


class ShardReader:
    """A reader of the items in a folder of shards, by number. The encoding must be complete.

    Each process opens a file when it first needs the file.

    Args:
        folder: a folder that `latentvae encode` wrote.

    Attributes:
        manifest, content: the folder's manifest, and the manifest's field `content`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self.content = self.manifest.content
        self._ends = list(accumulate(shard.items for shard in self.manifest.shards))
        self._open: dict[tuple[int, int], Any] = {}  # open files by process and shard
        for number in range(len(self.manifest.shards)):
            if not shard_path(self.folder, number).is_file():
                raise UserError(
                    f"'{shard_path(self.folder, number)}' is missing. Run the same `latentvae "
                    "encode` command again."
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files cannot move to another process

    def read(self, name: str, index: int) -> Tensor:
        """Return item `index` of the stored tensor `name`, as it is stored.

        Raises:
            IndexError: there is no item `index`.
            UserError: the shard is damaged.
        """
        shard, row = self._locate(index)
        rows = self._slice(shard, name)
        if rows.get_shape()[0] != self.manifest.shards[shard].items:
            raise self._damaged(shard)
        return rows[row : row + 1][0]

    def whole(self, name: str) -> Tensor:
        """Return the stored tensor `name` of all items, (n, ...).

        Raises:
            UserError: a shard is damaged.
        """
        parts = []
        for shard, listed in enumerate(self.manifest.shards):
            parts.append(self._slice(shard, name)[:])
            if len(parts[-1]) != listed.items:
                raise self._damaged(shard)
        return torch.cat(parts)

    def payload(self, index: int) -> Tensor:
        """Return an item's tokens in 0..K - 1, or its latent, as stored.

        Raise UserError if the shape, the type or the range of the values is wrong.
        """
        shard, _ = self._locate(index)
        item = self.read(self.content.payload, index)
        self._check(item[None], shard, first=index)
        return item

    def name(self, index: int) -> str:
        """Return the image's name in its source."""
        return self._text_of(index, "id")

    def names(self) -> list[str]:
        """Return the names of all items."""
        return self._texts("id")

    def caption(self, index: int) -> str:
        """Return the image's caption, "" if it has none. The shards must hold captions."""
        return self._text_of(index, "caption")

    def captions(self) -> list[str]:
        """Return the captions of all items. An item without a caption has an empty text."""
        return self._texts("caption") if self.content.captions else [""] * len(self)

    def _text_of(self, index: int, kind: str) -> str:
        shard, row = self._locate(index)
        ends = self._slice(shard, f"{kind}_ends")[max(row - 1, 0) : row + 1].tolist()
        data = self._slice(shard, f"{kind}s")[ends[0] if row else 0 : ends[-1]]
        return _text(data.numpy().tobytes())

    def _texts(self, kind: str) -> list[str]:
        result: list[str] = []
        for shard, listed in enumerate(self.manifest.shards):
            data = self._slice(shard, f"{kind}s")[:].numpy().tobytes()
            ends = [0, *self._slice(shard, f"{kind}_ends")[:].tolist()]
            if len(ends) != listed.items + 1 or ends[-1] != len(data) or ends != sorted(ends):
                raise self._damaged(shard)
            result += [_text(data[start:end]) for start, end in pairwise(ends)]
        return result

    def check(self) -> None:
        """Check every item as `payload` does.

        Raises:
            UserError: an item or shard is wrong. The error names the first wrong item or shard.
        """
        for shard, end in enumerate(self._ends):
            rows = self._slice(shard, self.content.payload)
            if not rows.get_shape():
                raise self._damaged(shard)
            rows = rows[:]
            if len(rows) != self.manifest.shards[shard].items:
                raise self._damaged(shard)
            self._check(rows, shard, first=end - len(rows))

    def verify(self) -> None:
        """Compare every file with the sha256 in the manifest.

        Raises:
            UserError: a file is missing, or differs from its sha256. The error names the first
                file with this fault.
        """
        for number, shard in enumerate(self.manifest.shards):
            files = {shard_path(self.folder, number): shard.sha256}
            if shard.table_sha256 is not None:
                files[table_path(self.folder, number)] = shard.table_sha256
            for path, digest in files.items():
                if not path.is_file() or sha256_of(path) != digest:
                    raise UserError(
                        f"'{path}' does not match '{path.parent / 'manifest.json'}', because "
                        f"{path.name} is damaged, changed or missing. Run the same `latentvae "
                        "encode` command again to repair it."
                    )

    def _locate(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} does not exist: there are {len(self)} items.")
        index %= len(self)
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _slice(self, shard: int, name: str) -> Any:
        key = os.getpid(), shard
        try:
            if key not in self._open:
                if len(self._open) >= MAX_OPEN:
                    del self._open[next(iter(self._open))]
                self._open[key] = safe_open(shard_path(self.folder, shard), "pt")
            return self._open[key].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard) from error

    def _check(self, rows: Tensor, shard: int, *, first: int) -> None:
        """Check the shape, type and range of n items. `first` is the number of the first item."""
        content = self.content
        if tuple(rows.shape[1:]) != content.item_shape or rows.dtype != DTYPES[content.dtype]:
            raise self._damaged(shard)
        if content.num_codes is None or not len(rows):
            return
        indices = rows.long().flatten(1)
        wrong = ((indices < 0) | (indices >= content.num_codes)).any(dim=1).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            low, high = int(indices[row].min()), int(indices[row].max())
            raise UserError(
                f"the tokens of '{self.name(first + row)}' must be in 0..{content.num_codes - 1} "
                f"(got {low}..{high}). The shard is damaged: encode again."
            )

    def _damaged(self, shard: int) -> UserError:
        return UserError(
            f"'{shard_path(self.folder, shard)}' is damaged: it does not hold what the manifest "
            "says. Run the same `latentvae encode` command again to repair it."
        )


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


class _Cached(Dataset[dict[str, Any]]):
    """Base class of `TokenDataset` and `LatentDataset`: reader, length, names, labels, captions."""

    kind: str

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.reader = ShardReader(folder)
        self.content = self.reader.content
        if self.content.kind != self.kind:
            name = {"tokens": "TokenDataset", "latents": "LatentDataset"}[self.content.kind]
            raise UserError(
                f"'{folder}' holds {self.content.kind}, not {self.kind}. Read it with {name}."
            )

    @property
    def class_names(self) -> list[str] | None:
        """Names of labels 0, 1, 2 and so on, if they have names."""
        return self.content.class_names

    def __len__(self) -> int:
        return len(self.reader)

    def _annotations(self, index: int) -> dict[str, Any]:
        result: dict[str, Any] = {"id": self.reader.name(index)}
        if self.content.labels:
            result["label"] = int(self.reader.read("labels", index))
        if self.content.captions:
            result["caption"] = self.reader.caption(index)
        return result


class TokenDataset(_Cached):
    """A data set of tokens.

    An item is `{"indices": int64 (h, w) or (L, h, w), "id": str, "label": int, "caption": str}`.

    If the tokens have levels of several sizes, `levels` lists the sizes, and `indices.flatten()` is
    the sequence of tokens, coarsest level first.

    `label` exists if the data has classes (-1 for an image without a class), and `caption` if the
    data has captions. A DataLoader can use any number of workers. An item is loaded when it is
    needed.

    Args:
        folder: a folder that `latentvae encode` wrote for a tokenizer.
    """

    kind = "tokens"

    @property
    def num_codes(self) -> int:
        """Number of codes K of the tokenizer that made the tokens."""
        assert self.content.num_codes is not None
        return self.content.num_codes

    @property
    def levels(self) -> tuple[tuple[int, int], ...] | None:
        """Size (h, w) of each level, coarsest first, or None if all have the same size."""
        return self.content.levels

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"indices": self.reader.payload(index).long(), **self._annotations(index)}


class LatentDataset(_Cached):
    """A data set of latents: `{"latent": float32 (d, h, w), "id": str, "label": int, ...}`.

    `label` exists if the data has classes, and `caption` if the data has captions.

    Args:
        folder: a folder that `latentvae encode` wrote for continuous latents.
        scaled: shift and scale latents to about unit variance, for a diffusion model. For FLUX.2,
            2 x 2 positions also become channels.
        sample: sample the posterior with PyTorch's global generator. The shards must have been
            encoded with `--moments`.
    """

    kind = "latents"

    def __init__(
        self, folder: str | os.PathLike[str], *, scaled: bool = False, sample: bool = False
    ) -> None:
        super().__init__(folder)
        if sample and not self.content.moments:
            raise UserError(
                f"'{folder}' holds no standard deviations, but `sample` needs them. Encode with "
                "--moments."
            )
        self.sample = sample
        self.normalization = self._normalization() if scaled else None

    def __getitem__(self, index: int) -> dict[str, Any]:
        z = self.reader.payload(index).float()
        if self.sample:
            z = z + self.reader.read("stds", index).float() * torch.randn_like(z)
        if self.normalization is not None:
            z = self.normalization.apply(z[None])[0]
        return {"latent": z, **self._annotations(index)}

    def _normalization(self) -> LatentNormalization:
        norm = self.content.normalization
        assert norm is not None
        mean, scale = torch.tensor(norm.mean), torch.tensor(norm.scale)
        return LatentNormalization(1.0, 0.0, mean, scale, norm.fold)
