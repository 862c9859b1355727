"""Open and transform the images of a run, and make batches in an order that the seed decides."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latentvae.data import (
    Buckets,
    BucketSampler,
    DatasetSpec,
    EvalTransform,
    HubImages,
    ImageSource,
    ImageStream,
    IndexSampler,
    PixelFormat,
    Subset,
    TrainImages,
    TrainTransform,
    aspect_ratios,
    assign,
    open_images,
    open_source,
    set_pixel_limit,
    stream_loader,
    train_loader,
)
from latentvae.data.split import BUILT_IN
from latentvae.distributed import from_main, is_main, rank, world_size
from latentvae.tasks.image_config import ImageJobConfig

STREAM_HELD_OUT = 256  # number of images at a stream's start that are kept for validation


def open_data(config: ImageJobConfig) -> tuple[ImageSource | ImageStream, ImageSource]:
    """Open the training and validation images and return both sources."""
    data, spec = config.data, _spec(config)
    # This process reads the image sizes for the aspect-ratio buckets, so it needs `max_pixels`.
    set_pixel_limit(data.max_pixels)
    pixels = PixelFormat(
        data.image_channels,
        data.value_range,
        ignore_icc=data.ignore_icc,
        max_pixels=data.max_pixels,
        all_pages=data.all_pages,
    )

    # a stream
    if isinstance(spec, DatasetSpec) and data.streaming:
        validation = data.validation_data_dir
        held_out = 0 if validation else STREAM_HELD_OUT
        stream = ImageStream(
            spec, held_out=held_out, shuffle_buffer=data.shuffle_buffer, pixels=pixels
        )
        if not validation:
            return stream, stream.held_out
        return stream, open_source(validation, pixels=pixels)

    # images that can be read by index
    return open_images(
        spec,
        validation_data_dir=data.validation_data_dir,
        split_share=data.validation_share,
        seed=config.run.seed,
        max_train_samples=data.max_train_samples,
        pixels=pixels,
    )


def _spec(config: ImageJobConfig) -> str | DatasetSpec:
    """Return a path, or the name of a data set with the options for the package `datasets`."""
    data = config.data
    name = data.dataset_name or data.train_data_dir
    assert name is not None
    only_a_name = data.dataset_config_name is data.image_column is data.cache_dir is None
    only_a_name = only_a_name and data.dataset_split == "train"
    if name in BUILT_IN or (data.dataset_name is None and only_a_name):
        return name
    return DatasetSpec(
        name=name,
        config_name=data.dataset_config_name,
        split=data.dataset_split,
        image_column=data.image_column,
        cache_dir=data.cache_dir,
    )


def train_transform(config: ImageJobConfig) -> TrainTransform:
    data = config.data
    return TrainTransform(
        data.size,
        crop=data.crop,
        crop_scale=(data.crop_min_side, data.crop_max_side),
        random_flip=data.random_flip,
        interpolation=data.image_interpolation_mode,
        resize_with=data.resize_with,
        jpeg_draft=data.jpeg_draft,
    )


def eval_transform(config: ImageJobConfig) -> EvalTransform:
    return EvalTransform(config.data.size, interpolation=config.data.image_interpolation_mode)


def data_identity(images: ImageSource | ImageStream) -> dict[str, Any]:
    """Return the facts about the images that must stay the same on resume.

    The facts are the number of images and the hash of their names, which decide the order of the
    images. For a stream, the facts are data set, configuration, split and column. If the images are
    table rows without names, configuration and column belong to the facts too. The folder of a
    local data set is not one of the facts, so the folder may be moved before a resume.
    """
    # streams
    if isinstance(images, ImageStream):
        return {
            "data set": Path(images.name).name if Path(images.name).exists() else images.name,
            "configuration": images.config_name,
            "split": images.split,
            "column": images.column,
        }

    # number and names
    digest = hashlib.sha256()
    for i in range(len(images)):
        digest.update(images.name(i).encode(errors="surrogateescape") + b"\0")
    identity = {"images": len(images), "names_sha256": digest.hexdigest()}

    # rows without names
    whole = images
    while isinstance(whole, Subset):
        whole = whole.source
    if isinstance(whole, HubImages) and whole.numbered:
        identity |= {"configuration": whole.origin[1], "column": whole.column}
    return identity


def batches(
    config: ImageJobConfig, images: ImageSource | ImageStream, *, start_step: int, pin_memory: bool
) -> tuple[Iterable[Any], int | None]:
    """Return an endless iterable of this rank's batches, and the number of batches in an epoch.

    The number of batches is None for a stream of unknown length.
    """
    transform, seed = train_transform(config), config.run.seed
    read, crops = config.images_read, config.data.crops_per_image
    place = {"rank": rank(), "world_size": world_size(), "start_step": start_step, "seed": seed}
    loading = {"num_workers": config.data.dataloader_num_workers, "pin_memory": pin_memory}

    # a stream
    if isinstance(images, ImageStream):
        per_epoch = (images.num_images or 0) // (read * world_size()) or None
        loader = stream_loader(images, transform, batch_size=read, crops=crops, **place, **loading)
        return loader, per_epoch

    # Images that can be read by index. One rank reads their sizes for the buckets.
    ratios = None
    if config.data.aspect_ratio_buckets:
        if is_main():
            print(f"reading the sizes of {len(images):,} images for the buckets", flush=True)
        ratios = from_main(aspect_ratios(images) if is_main() else None)
    buckets = image_buckets(config, ratios, processes=world_size())
    if buckets is not None and is_main():
        print(f"  buckets        {buckets.describe()} images")
    sampler = image_sampler(config, len(images), buckets, **place)
    dataset = TrainImages(images, transform, seed=seed, crops=crops, buckets=buckets)
    return train_loader(dataset, sampler, **loading), sampler.steps_per_epoch


def image_buckets(config: ImageJobConfig, ratios: Any | None, *, processes: int) -> Buckets | None:
    """Return each image's bucket (training size of similar aspect ratio). None without buckets."""
    if ratios is None:
        return None
    return assign(ratios, config.train_sizes, at_least=config.images_read * processes)


def image_sampler(
    config: ImageJobConfig, num_images: int, buckets: Buckets | None, **place: int
) -> IndexSampler | BucketSampler:
    """Return the sampler of the images. `place` is rank, world_size, start_step and seed."""
    if buckets is not None:
        return BucketSampler(buckets, config.images_read, **place)
    return IndexSampler(num_images, config.images_read, **place)
