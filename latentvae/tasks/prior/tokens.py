"""Open folders of tokens as one table in memory, and hold out some images for validation.

Symbols: `n` images, `B` batch, `T` tokens of an image, `K` codes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentvae.latents.formats.shards import Content
from latentvae.latents.shard_dataset import TokenDataset
from latentvae.tasks.prior.config import TokensConfig
from latentvae.tasks.shards import ItemTable, annotations, open_split

# Fields of `Content` that must be equal in all folders.
SAME = {
    "num_codes": "codes K",
    "item_shape": "shape of tokens",
    "model_sha256": "tokenizer weights",
    "class_names": "class names",
}


class Batch(NamedTuple):
    """The tokens of the images of one batch.

    Attributes:
        indices: tokens of the images, (B, T), int64.
        classes: (B,), int64, `NO_CLASS` for an image without a class.
        numbers: index of each image in the `TokenTable` that the batch comes from.
    """

    indices: Tensor
    classes: Tensor
    numbers: list[int]


@dataclass(frozen=True)
class TokenTable(ItemTable):
    """The tokens of images, in memory.

    Attributes:
        sequences: tokens (n, T), in the integer type that the shards have.
    """

    sequences: Tensor

    def rows(self, numbers: Sequence[int]) -> Batch:
        """Return the tokens and classes of the images with these indices."""
        chosen = torch.as_tensor(numbers)
        return Batch(self.sequences[chosen].long(), self.classes[chosen], list(numbers))

    def shuffled(self, seed: int, *, level_sizes: Sequence[int]) -> "TokenTable":
        """Return a table with tokens shuffled in each level (token map), differently per image."""
        orders = []
        for number in range(len(self)):
            rng, ends = np.random.default_rng([seed, number]), np.cumsum([0, *level_sizes])
            parts = zip(ends, level_sizes, strict=False)
            orders.append(np.concatenate([end + rng.permutation(size) for end, size in parts]))
        order = torch.from_numpy(np.stack(orders))
        return replace(self, sequences=self.sequences.gather(1, order))

    def identity(self) -> dict[str, Any]:
        """Return the number of images, and a hash of their tokens, classes and names."""
        digest = hashlib.sha256()
        for part in (self.sequences, self.classes):
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        digest.update("\0".join(self.names).encode(errors="surrogateescape"))
        return {"images": len(self), "tokens": digest.hexdigest()[:16]}


@dataclass(frozen=True)
class TokenData:
    """Tokens to train on and to validate on, with facts about them.

    Attributes:
        content: facts from the manifest of the first folder, such as the number of codes.
        model: name or path of the tokenizer, as recorded in the manifest.
        levels: (height, width) in tokens of each level (token map), coarsest level first.
        num_codes: number of codes K of each level.
    """

    train: TokenTable
    validation: TokenTable
    content: Content
    model: str
    levels: tuple[tuple[int, int], ...]
    num_codes: int


def open_tokens(options: TokensConfig, *, seed: int) -> TokenData:
    """Read all tokens, and choose the images for validation.

    Raises:
        UserError: no folder is given, a folder holds no tokens or damaged tokens, two folders
            differ in tokenizer, shape or classes, or the validation folder has the same images as a
            training folder.
    """
    first, train, validation = open_split(
        TokenDataset,
        joined,
        SAME,
        option="tokens",
        folders=options.tokens,
        validation=options.validation_tokens,
        share=options.validation_share,
        at_most=options.max_validation_images,
        seed=seed,
    )

    content, levels = first.content, levels_of(first.content)
    if options.shuffle_tokens:
        sizes = [height * width for height, width in levels]
        train = train.shuffled(seed, level_sizes=sizes)
        validation = validation.shuffled(seed + 1, level_sizes=sizes)
    model = first.reader.manifest.model
    return TokenData(train, validation, content, model, levels, first.num_codes)


def levels_of(content: Content) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of each level (token map) of an image, coarsest level first."""
    if content.levels is not None:
        return content.levels
    *repeated, height, width = content.item_shape
    return ((height, width),) * (repeated[0] if repeated else 1)


def mean_unigram_bits(data: TokenData) -> float:
    """Return the bits per validation token of a model that only knows the codes' frequencies.

    Each level (token map) has its own frequencies. The result is the mean over all tokens.
    """
    sizes = [height * width for height, width in data.levels]
    tables = (data.train, data.validation)
    parts = [table.sequences.split(sizes, dim=1) for table in tables]
    pairs = zip(*parts, sizes, strict=True)
    bits = [unigram_bits(own, held, num_codes=data.num_codes) * n for own, held, n in pairs]
    return sum(bits) / sum(sizes)


def unigram_bits(train: Tensor, validation: Tensor, *, num_codes: int) -> float:
    """Return the bits per validation token of a model that only knows the codes' frequencies.

    The frequencies are those of the training tokens. 1 is added to the count of every code, so that
    no code has probability 0.

    Args:
        train: tokens of one level, any shape.
        validation: tokens of the same level, on which the bits are measured.
    """
    counts = torch.bincount(train.long().flatten(), minlength=num_codes).double() + 1
    bits = -(counts / counts.sum()).log2()
    return bits[validation.long().flatten()].mean().item()


def joined(folders: Sequence[TokenDataset]) -> TokenTable:
    """Read the tokens of folders as one table.

    Raises:
        UserError: a shard is damaged.
    """
    readers, sequences = [folder.reader for folder in folders], list[Tensor]()
    for reader in readers:
        reader.check()
        sequences.append(reader.whole(reader.content.payload).flatten(1))
    return TokenTable(**annotations(readers), sequences=torch.cat(sequences))
