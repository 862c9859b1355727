"""Open folders of latents as one table in memory, and hold out some images for validation.

Symbols: `n` images, `B` batch, `d` latent channels, `h w` height and width of latents.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.latents.formats.shards import Content
from latentvae.latents.shard_dataset import LatentDataset
from latentvae.latents.statistics import LatentStatistics
from latentvae.models.normalization import LatentNormalization
from latentvae.tasks.flow.config import LatentsConfig
from latentvae.tasks.shards import ItemTable, annotations, open_split

# Fields of `Content` that must be equal in all folders.
SAME = {
    "item_shape": "shape of latents",
    "model_sha256": "autoencoder weights",
    "class_names": "class names",
    "moments": "moments",
}


class Batch(NamedTuple):
    """The latents of the images of one batch.

    Attributes:
        z: latents before normalisation, (B, d, h, w), float32.
        stds: posterior standard deviations of the latents, (B, d, h, w). None if the folders hold
            no standard deviations.
        classes: (B,), int64, `NO_CLASS` for an image without a class.
        captions: caption of each image, "" for an image without a caption.
        numbers: index of each image in the `LatentTable` that the batch comes from.
    """

    z: Tensor
    stds: Tensor | None
    classes: Tensor
    captions: list[str]
    numbers: list[int]


@dataclass(frozen=True)
class LatentTable(ItemTable):
    """The latents of images, in memory.

    Attributes:
        z: latents (n, d, h, w), in the data type that the shards have.
        stds: posterior standard deviations, with the shape of `z`. None if the shards hold none.
    """

    z: Tensor
    stds: Tensor | None

    def rows(self, numbers: Sequence[int]) -> Batch:
        """Return the latents, classes and captions of the images with these indices."""
        chosen = torch.as_tensor(numbers)
        stds = None if self.stds is None else self.stds[chosen].float()
        captions = [self.captions[number] for number in numbers]
        return Batch(self.z[chosen].float(), stds, self.classes[chosen], captions, list(numbers))

    def identity(self) -> dict[str, Any]:
        """Return the number of images, and a hash of their latents, classes and names."""
        digest = hashlib.sha256()
        for part in (self.z, self.classes, *([] if self.stds is None else [self.stds])):
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        digest.update("\0".join(self.names).encode(errors="surrogateescape"))
        return {"images": len(self), "latents": digest.hexdigest()[:16]}


@dataclass(frozen=True)
class LatentData:
    """Latents to train on and to validate on, with facts about them.

    Attributes:
        content: facts from the manifest of the first folder, such as shape and dtype of the
            latents.
        model: name or path of the autoencoder, as recorded in the manifest.
        normalization: shift and scale that bring latents to about unit variance.
        shape: (d, h, w) of normalised latents.
    """

    train: LatentTable
    validation: LatentTable
    content: Content
    model: str
    normalization: LatentNormalization
    shape: tuple[int, int, int]


def open_latents(options: LatentsConfig, *, seed: int) -> LatentData:
    """Read all latents, and choose the latents for validation.

    Raises:
        UserError: no folder is given, a folder holds no latents or damaged latents, or two folders
            differ in autoencoder, shape or classes. The error is also raised if only some folders
            hold standard deviations (moments), if the validation folder has the same images as a
            training folder, or if a channel is constant and `normalization` is "channel".
    """
    first, train, validation = open_split(
        LatentDataset,
        joined,
        SAME,
        option="latents",
        folders=options.latents,
        validation=options.validation_latents,
        share=options.validation_share,
        at_most=options.max_validation_images,
        seed=seed,
    )

    normalization = _normalization(first.content, train, options)
    example = normalization.apply(train.rows([0]).z)
    channels, height, width = example.shape[1:]
    return LatentData(
        train,
        validation,
        first.content,
        first.reader.manifest.model,
        normalization,
        (channels, height, width),
    )


def _normalization(
    content: Content, train: LatentTable, options: LatentsConfig
) -> LatentNormalization:
    """Return the normalisation that the option `normalization` chooses.

    `model` takes the normalisation that diffusers' pipelines use for the autoencoder. `channel`
    measures the mean and the standard deviation of each channel of the latents.
    """
    norm = content.normalization
    assert norm is not None  # every folder of latents has a normalisation
    if options.normalization == "model":
        return LatentNormalization(
            1.0, 0.0, torch.tensor(norm.mean), torch.tensor(norm.scale), norm.fold
        )

    if not options.posterior_sample:
        train = replace(train, stds=None)
    return measured_normalization(train, fold=norm.fold)


def measured_normalization(train: LatentTable, *, fold: int) -> LatentNormalization:
    """Return a normalisation by the measured mean and standard deviation of each channel.

    Args:
        train: the latents to measure. If the table has posterior standard deviations, the result
            normalises samples of the posteriors, not their means.
        fold: side of the squares of positions that are folded into channels. 1 folds nothing.

    Raises:
        UserError: a channel is constant.
    """
    folded = LatentNormalization(1.0, 0.0, torch.zeros(1), torch.ones(1), fold)
    statistics = LatentStatistics()
    for start in range(0, len(train), 1024):
        statistics.update(folded.apply(train.z[start : start + 1024].float()))

    mean, std = statistics.channel_mean, statistics.channel_std
    if train.stds is not None:
        noise = [folded.apply(part.float().square()) for part in train.stds.split(1024)]
        std = (std.square() + torch.cat(noise).double().mean(dim=(0, 2, 3))).sqrt()
    if (constant := (std < 1e-6).nonzero().flatten().tolist()) != []:
        raise UserError(
            f"channel {constant[0]} of the latents is constant, so it cannot be scaled to "
            "variance 1. Give --normalization model."
        )
    return LatentNormalization(1.0, 0.0, mean.float(), (1 / std).float(), fold)


def joined(folders: Sequence[LatentDataset]) -> LatentTable:
    """Read the latents of folders as one table.

    Raises:
        UserError: a shard is damaged, or latents are not finite.
    """
    readers, latents, stds = [folder.reader for folder in folders], list[Tensor](), list[Tensor]()
    for reader in readers:
        reader.check()
        latents.append(reader.whole(reader.content.payload))
        if not latents[-1].isfinite().all():
            raise UserError(
                f"'{reader.folder}' has latents that are not finite numbers. Encode the images "
                "again, with --dtype float32."
            )
        stds += [reader.whole("stds")] if reader.content.moments else []
    spreads = torch.cat(stds) if stds else None
    return LatentTable(**annotations(readers), z=torch.cat(latents), stds=spreads)
