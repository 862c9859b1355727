"""Training images from a data set too large to download, read row by row.

A stream cannot read an image by its number. So the images are shuffled only within a buffer, and a
resumed run does not read exactly the same images as a run without interruption. If the images fit
on disk, use ``open_images``: all images are then shuffled, and a resumed run reads the same images.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from latentvae.data.dataset import MAX_ATTEMPTS, QuietLoader, TrainItem, loading
from latentvae.data.hub_datasets import (
    DatasetSpec,
    cell_bytes,
    image_column,
    open_rows,
    table_folder,
    undecoded,
)
from latentvae.data.image_folder import inner_name, read_named
from latentvae.data.pixels import Picture, PixelFormat
from latentvae.data.random_draws import Stream, counter_rng
from latentvae.data.reading import UnreadableImage
from latentvae.data.sizes import read_size
from latentvae.data.transforms import TrainTransform
from latentvae.data.workers import explained_workers
from latentvae.errors import UserError

logger = logging.getLogger(__name__)


class FirstRows:
    """An image source for validation: the first rows of a stream, kept in memory undecoded.

    Args:
        files: (name, bytes of the file) of each image.
        pixels: the format of every image. None means 8-bit RGB.
    """

    def __init__(
        self, files: list[tuple[str, bytes]], *, pixels: PixelFormat | None = None
    ) -> None:
        self.files = files
        self.pixels = pixels
        self.digests = {_digest(data) for _, data in files}

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int, /) -> str:
        return self.files[index][0]

    def read(self, index: int, /, *, at_least: int | None = None) -> Picture:
        return read_named(*self.files[index], at_least=at_least, pixels=self.pixels)

    def size(self, index: int, /) -> tuple[int, int]:
        name, data = self.files[index]
        return read_size(data, name=name)


class ImageStream:
    """A data set that is read as a stream: row by row, without random access.

    Args:
        spec: the data set.
        held_out: number of first rows that are kept in memory for validation, in the attribute
            ``held_out``. Files with the same bytes as one of these rows are never trained on.
        shuffle_buffer: number of undecoded images kept in memory in each worker. Each worker draws
            its next image at random from this buffer.
        pixels: the format of every image. None means 8-bit RGB.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        *,
        held_out: int = 0,
        shuffle_buffer: int = 1000,
        pixels: PixelFormat | None = None,
    ) -> None:
        if pixels is not None and pixels.all_pages:
            raise UserError(
                "all_pages reads the pages of TIFF files in folders and tar shards, not in a "
                "stream. Leave all_pages or streaming out."
            )
        rows, self.split = open_rows(spec, streaming=True)
        self.name, self.config_name = spec.name, spec.config_name
        self.column = image_column(rows.features, wanted=spec.image_column)
        self.rows = undecoded(rows, self.column)
        self.shuffle_buffer = shuffle_buffer
        self.pixels = pixels
        self.folder = table_folder(spec.name)
        files = list(_files(self._cells(held_out), split=self.split, folder=self.folder))
        self.held_out = FirstRows(files, pixels=pixels)

    @property
    def num_images(self) -> int | None:
        """Number of rows in the split, or None if the data set does not state this number."""
        splits = self.rows.info.splits or {}
        return splits[self.split].num_examples if self.split in splits else None

    def part(self, epoch: int, *, seed: int, rank: int, world_size: int) -> Any:
        """Return the rows that one rank reads in one epoch, shuffled by (seed, epoch)."""
        from datasets.distributed import split_dataset_by_node

        order = int(counter_rng(Stream.ORDER, seed, epoch).integers(2**31))
        shuffled = self.rows.shuffle(seed=order, buffer_size=self.shuffle_buffer)
        return split_dataset_by_node(shuffled, rank=rank, world_size=world_size)

    def _cells(self, count: int) -> Iterator[Any]:
        return (row[self.column] for row in self.rows.take(count))


def stream_loader(
    stream: ImageStream,
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    crops: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
) -> DataLoader[TrainItem]:
    """Return a loader that yields batches (``Batch``) of a stream without end.

    The stream's files are divided among the ranks, and each rank's files among its workers. If the
    number of files is not a multiple of the number of ranks, each rank reads all files, but keeps
    only its share of the rows. The number of workers changes the order of the images. A rank has at
    most as many workers as files.

    Args:
        stream: the images.
        transform: the augmentation.
        batch_size: number of images read per rank and micro-step.
        seed: seed of order and augmentation, 0 or above.
        crops: N, the number of crops of each image. A batch has N times ``batch_size`` crops.
        num_workers: number of additional processes that read and decode images.
        pin_memory: put batches into pinned memory, from which CUDA can copy while it computes.
        rank: number of this process.
        world_size: number of processes.
        start_step: number of micro-steps already done. The loader skips as many images as these
            steps used, but the skipped images are not exactly the images that the steps used.
    """
    part = stream.part(0, seed=seed, rank=rank, world_size=world_size)
    num_workers = min(num_workers, part.num_shards)

    if start_step and rank == 0:
        logger.warning(
            "'%s' is streamed and resumes only approximately: each rank skips %d images.",
            *(stream.name, start_step * batch_size),
        )

    images = _TrainStream(
        stream,
        transform,
        seed=seed,
        crops=crops,
        ranks=(rank, world_size),
        batches_done=start_step,
        batch_size=batch_size,
    )
    with explained_workers(num_workers):
        return QuietLoader(images, batch_size=batch_size, **loading(num_workers, pin_memory))


class _TrainStream(IterableDataset[TrainItem]):
    def __init__(
        self,
        stream: ImageStream,
        transform: TrainTransform,
        *,
        seed: int,
        crops: int,
        ranks: tuple[int, int],
        batches_done: int,
        batch_size: int,
    ) -> None:
        self.stream = stream
        self.transform = transform
        self.seed = seed
        self.crops = crops
        self.ranks = ranks
        self.batches_done = batches_done
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[TrainItem]:
        # where this worker starts
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # DataLoader takes whole batches from the workers in turn.
        done = len(range(worker, self.batches_done, workers)) * self.batch_size
        rank, world_size = self.ranks

        # image numbers that no other rank or worker uses
        numbers = itertools.count(
            (done * workers + worker) * world_size + rank, workers * world_size
        )

        # epochs already done, and the number of images to skip in the next epoch
        share = (self.stream.num_images or 0) // (world_size * workers)
        first, skip = divmod(done, share) if share else (0, done)

        # epochs
        for epoch in itertools.count(first):
            rows = iter(self.stream.part(epoch, seed=self.seed, rank=rank, world_size=world_size))
            skipped = sum(1 for _ in itertools.islice(rows, skip))
            skip -= skipped
            shown = 0
            for item in self._items(rows, numbers):
                yield item
                shown += 1
            if not skipped and not shown:
                raise UserError(
                    f"a worker ({world_size} processes with {workers} workers each) gets no "
                    f"training images from '{self.stream.name}'. Use fewer processes or workers, "
                    "or hold out fewer images."
                )

    def _items(self, rows: Iterable[Any], numbers: Iterator[int]) -> Iterator[TrainItem]:
        stream, bad = self.stream, list[tuple[str, str]]()
        for row, number in zip(rows, numbers, strict=False):
            rng = counter_rng(Stream.AUGMENT, self.seed, 0, number)
            windows = [self.transform.draw(rng) for _ in range(self.crops)]
            cell = row[stream.column]
            name = _name(cell, f"{stream.split}/stream/{number}")
            try:
                data = cell_bytes(cell, name, folder=stream.folder)
                if _digest(data) in stream.held_out.digests:
                    continue
                at_least = self.transform.needed_side(windows)
                image = read_named(name, data, at_least=at_least, pixels=stream.pixels)
            except UnreadableImage as error:
                bad.append((name, error.reason))
                if len(bad) == MAX_ATTEMPTS:
                    raise
                continue
            yield TrainItem(crops=self.transform.crops(image, windows), index=number, bad=bad)
            bad = []


def _files(
    cells: Iterable[Any], *, split: str, folder: Path | None = None
) -> Iterator[tuple[str, bytes]]:
    for row, cell in enumerate(cells):
        name = _name(cell, f"{split}/{row:09d}")
        try:
            yield name, cell_bytes(cell, name, folder=folder)
        except UnreadableImage as error:
            logger.warning("Validation leaves out an image: %s", error)


def _name(cell: dict[str, Any] | None, otherwise: str) -> str:
    return inner_name((cell or {}).get("path") or "") or otherwise


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
