"""Make batches of images: endless and augmented for training, each image once for validation."""

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
from latentvae.data.workers import explained_workers, leave_signals_to_the_trainer

MAX_ATTEMPTS = 20  # Largest number of images that are tried for one place in a batch.
# Number of batches that each worker prepares ahead, to bridge a series of large files.
PREFETCHED = 4

logger = logging.getLogger(__name__)


class TrainItem(TypedDict):
    """The crops of one image, and the unreadable files that were tried before this image.

    Attributes:
        crops: (N, C, H, W) for N crops, uint8 or float32 (see `Batch`).
        index: the number of the image in its source. In a stream, each image that is read gets a
            new number.
        bad: (name, reason) of each unreadable file.
    """

    crops: Tensor
    index: int
    bad: list[tuple[str, str]]


class Batch(NamedTuple):
    """The images of one micro-step (one forward and backward pass) on one rank.

    Attributes:
        images: (B, C, H, W) for B crops, uint8, or float32 in [-1, 1] if an image of the batch is a
            `DeepImage`, such as an image of more than 8 bits per channel. A uint8 batch has a
            quarter of the bytes of a float32 batch, which makes the transfer from the workers to
            the device faster.
        indices: (B,), int64, the number of the image from which each crop comes. If an image
            replaced an unreadable image, `indices` has the number of the replacement.
        bad: (name, reason) of each unreadable file that was tried.
    """

    images: Tensor
    indices: Tensor
    bad: list[tuple[str, str]]

    def on(self, device: torch.device | str) -> Tensor:
        """Return the images on `device`, (B, C, H, W), float32 in [-1, 1].

        A copy from pinned memory does not make the host wait for the device.
        """
        return normalised(self.images.to(device, non_blocking=True))


class TrainImages(Dataset[TrainItem]):
    """A data set that returns the augmented crops of an image for a key (epoch, index).

    The crops depend only on epoch, index and seed.

    An unreadable file is replaced by a random image. The choice of this image depends only on seed,
    epoch, index and the number of replacements that were tried before it. If `MAX_ATTEMPTS` images
    for one place in a batch cannot be read, UnreadableImage is raised.

    Args:
        source: the images.
        transform: the augmentation.
        seed: seed of augmentation and replacement, 0 or above.
        crops: N, the number of crops of each image that is read (repeated augmentation, Hoffer et
            al. 2020, https://arxiv.org/abs/1901.09335). The first crop shows the same part of the
            image as with N = 1.
        buckets: the size to which each image is cropped. None means the transform's own size for
            all images. A replacement gets the crop size of the image that it replaces, so that all
            crops of the batch have one size.
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
            name,
            f"{reason} ({MAX_ATTEMPTS - 1} other images tried in its place cannot be read either)",
        )

    def _candidates(self, key: tuple[int, int]) -> Iterator[int]:
        yield key[1]
        for attempt in range(1, MAX_ATTEMPTS):
            yield int(counter_rng(Stream.REPLACE, self.seed, *key, attempt).integers(len(self)))


def collate(items: list[TrainItem]) -> Batch:
    """Join the items of one micro-step into a batch."""
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
    """Return a loader of batches (``Batch``), which never ends if `sampler` is an `IndexSampler`.

    The batches are the same for any number of workers. The global random generators are not used.

    Args:
        dataset: the images.
        sampler: an `IndexSampler`, which gives the order of the images from its ``start_step`` on,
            or a list with the (epoch, index) pairs of each batch. For each pair, a batch has N
            crops (see `TrainImages`).
        num_workers: number of processes that decode images. With 0, the calling process decodes the
            images.
        pin_memory: put batches into pinned memory, from which CUDA can copy while it computes.
    """
    with explained_workers(num_workers):
        return QuietLoader(dataset, batch_sampler=sampler, **loading(num_workers, pin_memory))


class QuietLoader(DataLoader[TrainItem]):
    """A DataLoader whose iterator does not repeat torch's warning about too many workers."""

    def __iter__(self) -> Any:
        with explained_workers(self.num_workers):
            return super().__iter__()


def loading(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    """Return the options of ``DataLoader`` that all training loaders share."""
    return {
        "num_workers": num_workers,
        "collate_fn": collate,
        "pin_memory": pin_memory,
        "persistent_workers": num_workers > 0,
        "prefetch_factor": PREFETCHED if num_workers > 0 else None,
        "worker_init_fn": leave_signals_to_the_trainer,
        "generator": torch.Generator(),  # by default, iter() draws from the global generator
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
    """Yield batches as pairs (images, names), with images of shape (b, C, H, W).

    All ranks together yield each readable image exactly once. Rank r of W ranks takes the images
    with numbers r, r + W, r + 2W and so on. A rank can have fewer batches than another rank, or no
    batch. So sum results over ranks only after the last batch, because an earlier sum could wait
    forever for a rank that has no batch left.

    Args:
        source: the images.
        transform: converts every image to a tensor of the same size.
        batch_size: largest number b of images in a batch.
        rank: number of this process.
        world_size: W, number of processes.
        bad: collects the unreadable files, which are left out. Without this argument, unreadable
            files are logged as warnings.
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

        # a full batch
        if len(images) == batch_size:
            yield torch.stack(images), names
            images, names = [], []

    # the last images
    if images:
        yield torch.stack(images), names


def _report(bad: BadImages | None, name: str, error: UnreadableImage) -> None:
    if bad is None:
        logger.warning("Validation leaves out an image: %s", error)
    else:
        bad.update([(name, error.reason)])
