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
from latentvae.tasks.autoencoder.run import Run, train_transform


def batches(run: Run, *, start_step: int) -> tuple[Iterable[Any], int | None]:
    """Endless batches, and micro-steps in which every image comes once (a stream may not know)."""
    images, transform, seed = run.train_images, train_transform(run.config), run.config.run.seed
    read, crops = run.config.images_read, run.config.data.crops_per_image
    place = {"rank": rank(), "world_size": world_size(), "start_step": start_step, "seed": seed}
    loading = {
        "num_workers": run.config.data.dataloader_num_workers,
        "pin_memory": run.accelerator.device.type == "cuda",
    }
    if isinstance(images, ImageStream):
        per_epoch = (images.num_images or 0) // (read * world_size()) or None
        loader = stream_loader(images, transform, batch_size=read, crops=crops, **place, **loading)
        return loader, per_epoch
    buckets = _buckets(run, images)
    if buckets is None:
        sampler = IndexSampler(len(images), read, **place)
    else:
        sampler = BucketSampler(buckets, read, **place)
    dataset = TrainImages(images, transform, seed=seed, crops=crops, buckets=buckets)
    return train_loader(dataset, sampler, **loading), sampler.steps_per_epoch


def _buckets(run: Run, images: ImageSource) -> Buckets | None:
    """The shape of every image; one rank reads the headers."""
    if not run.config.data.aspect_ratio_buckets:
        return None
    ratios = from_main(aspect_ratios(images) if is_main() else None)
    joint = run.config.images_read * world_size()
    buckets = assign(ratios, run.config.train_sizes, at_least=joint)
    run.accelerator.print(f"  buckets        {buckets.describe()} images")
    return buckets
