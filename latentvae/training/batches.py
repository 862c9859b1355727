"""The batches of a run, in the order that the seed gives, from any micro-step on."""

from collections.abc import Iterable
from typing import Any

from latentvae.data import (
    Buckets,
    BucketSampler,
    ImageSource,
    ImageStream,
    IndexSampler,
    TrainImages,
    aspect_ratios,
    assign,
    stream_loader,
    train_loader,
)
from latentvae.distributed import from_main, is_main, rank, world_size
from latentvae.training.run import Run, train_transform


def batches(run: Run, *, start_step: int) -> tuple[Iterable[Any], int | None]:
    """Endless batches, and micro-steps in which every image comes once (a stream may not know)."""
    options, images = run.config.run, run.train_images
    transform, workers = train_transform(run.config), run.config.data.dataloader_num_workers
    place = {"rank": rank(), "world_size": world_size(), "start_step": start_step}
    if isinstance(images, ImageStream):
        batch = options.train_batch_size
        place |= {"batch_size": batch, "seed": options.seed, "num_workers": workers}
        per_epoch = (images.num_images or 0) // (batch * world_size()) or None
        return stream_loader(images, transform, **place), per_epoch
    place |= {"seed": options.seed}
    buckets = _buckets(run, images)
    if buckets is None:
        sampler = IndexSampler(len(images), options.train_batch_size, **place)
    else:
        sampler = BucketSampler(buckets, options.train_batch_size, **place)
    dataset = TrainImages(images, transform, seed=options.seed, buckets=buckets)
    return train_loader(dataset, sampler, num_workers=workers), sampler.steps_per_epoch


def _buckets(run: Run, images: ImageSource) -> Buckets | None:
    """The shape of every image; one rank reads the headers."""
    if not run.config.data.aspect_ratio_buckets:
        return None
    ratios = from_main(aspect_ratios(images) if is_main() else None)
    joint = run.config.run.train_batch_size * world_size()
    buckets = assign(ratios, run.config.train_sizes, at_least=joint)
    run.accelerator.print(f"  buckets        {buckets.describe()} images")
    return buckets
