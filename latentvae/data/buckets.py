"""Aspect-ratio buckets: images of similar shape are trained together, so that little is cropped.

The method follows NovelAI 2022, "Aspect ratio bucketing", and the option `enable_bucket` of kohya's
training scripts.

All images of a batch come from one bucket, and all ranks use the same bucket in the same step. The
order of the images is a function of (seed, epoch). So to continue at the right image, a resumed run
needs only the number of steps already done, as with `IndexSampler`.

Symbols: `N` images, `B` images per rank and micro-step (one forward and backward pass), `W` ranks.
"""

import math
from dataclasses import dataclass

import numpy as np

from latentvae.data.image_folder import ImageSource
from latentvae.data.random_draws import Stream, counter_rng
from latentvae.data.reading import UnreadableImage
from latentvae.data.sampler import IndexSampler

WIDEST = 2.0  # width / height of the widest bucket. The tallest bucket has 1 / WIDEST.


@dataclass(frozen=True)
class Buckets:
    """The assignment of images to buckets (groups of similar shape), and the size of each bucket.

    Attributes:
        sizes: (height, width) of each bucket in pixels, from the tallest to the widest.
        of: index of the bucket to which each of N images belongs, (N,).
    """

    sizes: tuple[tuple[int, int], ...]
    of: np.ndarray

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width to which the training resizes and crops image `index`."""
        return self.sizes[self.of[index]]

    def describe(self) -> str:
        """Return a text with the height, the width and the number of images of each bucket."""
        counts = np.bincount(self.of, minlength=len(self.sizes))
        return ", ".join(
            f"{h} x {w}: {count:,}" for (h, w), count in zip(self.sizes, counts, strict=True)
        )


def bucket_sizes(
    resolution: tuple[int, int], count: int, *, multiple: int
) -> tuple[tuple[int, int], ...]:
    """Return up to ``count`` different bucket sizes (height, width), by rising aspect ratio.

    Before rounding, the logarithms of the aspect ratios (width / height) are evenly spaced, from a
    ratio of 1/2 to 2. With a ``count`` of 1, the ratio is 1.

    Args:
        resolution: height and width in pixels. The area of each bucket size is close to height
            times width.
        count: largest number of sizes, 1 or more. Sizes that become equal by rounding are merged.
        multiple: every side is a multiple of this number of pixels.
    """
    area = resolution[0] * resolution[1]
    ratios = np.geomspace(1 / WIDEST, WIDEST, count) if count > 1 else np.ones(1)
    sizes = {
        (_rounded(math.sqrt(area / r), multiple), _rounded(math.sqrt(area * r), multiple))
        for r in ratios.tolist()
    }
    return tuple(sorted(sizes, key=_aspect))


def _rounded(side: float, multiple: int) -> int:
    return max(round(side / multiple), 1) * multiple


def _aspect(size: tuple[int, int]) -> float:
    return size[1] / size[0]


def aspect_ratios(source: ImageSource, *, unreadable: float = 1.0) -> np.ndarray:
    """Return the width divided by the height of each of N images, (N,), from the file headers.

    An unreadable image gets the ratio `unreadable`. Such an image is reported later, when the
    training or the encoding tries to read it.
    """
    ratios = np.full(len(source), unreadable)
    for i in range(len(source)):
        try:
            width, height = source.size(i)
        except UnreadableImage:
            continue
        if min(width, height) > 0:
            ratios[i] = width / height
    return ratios


def assign(ratios: np.ndarray, sizes: tuple[tuple[int, int], ...], *, at_least: int) -> Buckets:
    """Put each image into the bucket with the nearest aspect ratio on a logarithmic scale.

    Args:
        ratios: width divided by height of each of N images, (N,).
        sizes: (height, width) of each bucket.
        at_least: smallest number of images in a bucket: the number of images that all ranks
            together use in one micro-step (one forward and backward pass). While a bucket has fewer
            images, the bucket with the fewest images is removed. Each of its images then goes to
            the nearest of the other buckets.
    """
    assert len(ratios) >= at_least
    while True:
        logs = np.log([_aspect(size) for size in sizes])
        of = np.abs(np.log(ratios)[:, None] - logs).argmin(axis=1)
        counts = np.bincount(of, minlength=len(sizes))
        smallest = int(counts.argmin())
        if counts[smallest] >= at_least:
            return Buckets(sizes, of)
        sizes = sizes[:smallest] + sizes[smallest + 1 :]


class BucketSampler(IndexSampler):
    """An `IndexSampler` that takes all images of a micro-step, on all ranks, from one bucket.

    A bucket is a group of images of similar shape. A micro-step is one forward and backward pass.
    No image is used twice in an epoch. A joint batch has the B images of each of the W ranks. In
    each epoch, a bucket leaves out fewer images than one joint batch has. Each epoch draws at
    random which images are left out.

    Args:
        buckets: the sizes of the buckets, and the bucket of every image.
        batch_size, seed, rank, world_size, start_step: see `IndexSampler`.
    """

    def __init__(
        self,
        buckets: Buckets,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        super().__init__(
            len(buckets.of),
            batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )
        self.buckets = buckets
        counts = np.bincount(buckets.of)
        self.steps_per_epoch = int((counts // (batch_size * world_size)).sum())

    def order(self, epoch: int) -> list[int]:
        """Return the image numbers of an epoch: the joint batches, one after the other."""
        rng, joint = counter_rng(Stream.ORDER, self.seed, epoch), self.batch_size * self.world_size
        shuffled = rng.permutation(self.num_items)
        batches: list[np.ndarray] = []
        for bucket in range(len(self.buckets.sizes)):
            images = shuffled[self.buckets.of[shuffled] == bucket]
            batches += list(images[: len(images) // joint * joint].reshape(-1, joint))
        return np.concatenate([batches[i] for i in rng.permutation(len(batches))]).tolist()
