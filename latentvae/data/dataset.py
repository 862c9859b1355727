"""Batches of images: for training endless and augmented, for validation each image exactly once."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentvae.data.bad_images import BadImages
from latentvae.data.buckets import Buckets
from latentvae.data.image_folder import ImageSource
from latentvae.data.random_draws import Stream, counter_rng
from latentvae.data.reading import UnreadableImage
from latentvae.data.resampling import normalised
from latentvae.data.sampler import IndexSampler
from latentvae.data.transforms import EvalTransform, TrainTransform
from latentvae.data.workers import leave_signals_to_the_trainer

MAX_ATTEMPTS = 20  # images tried for one place in a batch
PREFETCHED = 4  # batches of each worker that wait, to bridge a run of large files

logger = logging.getLogger(__name__)


class TrainItem(TypedDict):
    """The crops of one image (N, C, H, W), uint8 or float32 (see `Batch`), its index, and the
    unreadable files (name, reason) met before it."""

    crops: Tensor
    index: int
    bad: list[tuple[str, str]]


class Batch(NamedTuple):
    """One micro-step of one rank.

    Attributes:
        images: (B, C, H, W): uint8, which are a quarter of the bytes from the workers to the
            device, or float32 in [-1, 1] where one of them is deeper than 8 bits.
        indices: (B,), int64: the images that are in it (a replaced one counts, not the bad one).
        bad: the unreadable files met, as (name, reason).
    """

    images: Tensor
    indices: Tensor
    bad: list[tuple[str, str]]

    def on(self, device: torch.device | str) -> Tensor:
        """The images on that device, (B, C, H, W), float32 in [-1, 1]; no host sync."""
        return normalised(self.images.to(device, non_blocking=True))


class TrainImages(Dataset[TrainItem]):
    """Augmented images by (epoch, index); what comes back depends on these and the seed alone.

    An unreadable file is replaced by another image, drawn from (seed, epoch, index, attempt).

    Args:
        source: the images.
        transform: the augmentation.
        seed: of augmentation and replacement, 0 or above.
        crops: N, crops taken of each image that is read (repeated augmentation, Hoffer et al. 2020,
            https://arxiv.org/abs/1901.09335); the first is the one that N = 1 takes.
        buckets: the size each image is brought to; None is the transform's own. What replaces an
            image has its size, so that the batch stays of one.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: TrainTransform,
        *,
        seed: int,
        crops: int = 1,
        buckets: Buckets | None = None,
    ) -> None:
        self.source = source
        self.crops = crops
        self.buckets = buckets
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> TrainItem:
        rng = counter_rng(Stream.AUGMENT, self.seed, *key)
        windows = [self.transform.draw(rng) for _ in range(self.crops)]
        size = None if self.buckets is None else self.buckets.size(key[1])
        at_least = self.transform.needed_side(windows, size)
        bad: list[tuple[str, str]] = []
        for index in self._candidates(key):
            try:
                image = self.source.read(index, at_least=at_least)
            except UnreadableImage as error:
                bad.append((self.source.name(index), error.reason))
                continue
            return TrainItem(crops=self.transform.crops(image, windows, size), index=index, bad=bad)
        name, reason = bad[0]
        raise UnreadableImage(
            name, f"{reason} (nor could any of {MAX_ATTEMPTS - 1} others be read in its place)"
        )

    def _candidates(self, key: tuple[int, int]) -> Iterator[int]:
        yield key[1]
        for attempt in range(1, MAX_ATTEMPTS):
            yield int(counter_rng(Stream.REPLACE, self.seed, *key, attempt).integers(len(self)))


def collate(items: list[TrainItem]) -> Batch:
    """Join the items of one micro-step."""
    crops = [item["crops"] for item in items]
    if len({pixels.dtype for pixels in crops}) > 1:
        crops = [normalised(pixels) for pixels in crops]
    return Batch(
        images=torch.cat(crops),  # (B, C, H, W)
        indices=torch.tensor([item["index"] for item in items for _ in item["crops"]]),
        bad=[entry for item in items for entry in item["bad"]],
    )


def train_loader(
    dataset: TrainImages,
    sampler: IndexSampler | Sequence[list[tuple[int, int]]],
    *,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader[TrainItem]:
    """Endless batches (``Batch``), the same for any number of workers.

    The global random generators are not touched.

    Args:
        dataset: the images.
        sampler: the order of those that are read, from its ``start_step`` on, or (epoch, index) of
            each batch; its batches times the crops of each image are B.
        num_workers: processes that decode beside this one; 0 decodes in this one.
        pin_memory: put batches where CUDA copies from while it computes.
    """
    return DataLoader(dataset, batch_sampler=sampler, **loading(num_workers, pin_memory))


def loading(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    """How batches are made, whatever the images come from: options of ``DataLoader``."""
    return {
        "num_workers": num_workers,
        "collate_fn": collate,
        "pin_memory": pin_memory,
        "persistent_workers": num_workers > 0,
        "prefetch_factor": PREFETCHED if num_workers > 0 else None,
        "worker_init_fn": leave_signals_to_the_trainer,
        "generator": torch.Generator(),  # else every iter() draws from the global generator
    }


def validation_batches(
    source: ImageSource,
    transform: EvalTransform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    bad: BadImages | None = None,
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield (images (b, C, H, W), names), b up to ``batch_size``: each image once over all ranks.

    Rank r has the images r, r + W, r + 2W...: ranks may have unequal numbers of batches, or none,
    so reduce sums over ranks at the end only.

    Args:
        source: the images.
        transform: to one size.
        batch_size: images per batch, at most.
        rank: this process.
        world_size: W, number of processes.
        bad: takes the unreadable files, which are left out; without it they are logged as warnings.
    """
    images: list[Tensor] = []
    names: list[str] = []
    for index in range(rank, len(source), world_size):
        try:
            images.append(transform(source.read(index)))
        except UnreadableImage as error:
            _report(bad, source.name(index), error)
            continue
        names.append(source.name(index))
        if len(images) == batch_size:
            yield torch.stack(images), names
            images, names = [], []
    if images:
        yield torch.stack(images), names


def _report(bad: BadImages | None, name: str, error: UnreadableImage) -> None:
    if bad is None:
        logger.warning("left out of validation: %s", error)
    else:
        bad.update([(name, error.reason)])
