"""Read images from files, tar shards or tables (parquet), transform them, and make batches."""

from latentvae.data.bad_images import BadImages
from latentvae.data.buckets import Buckets, BucketSampler, aspect_ratios, assign, bucket_sizes
from latentvae.data.dataset import (
    Batch,
    TrainImages,
    collate,
    train_loader,
    validation_batches,
)
from latentvae.data.deep_files import set_pixel_limit
from latentvae.data.hub_datasets import DatasetSpec, HubImages
from latentvae.data.image_folder import ImageFolder, ImageSource
from latentvae.data.pixels import EIGHT_BIT, DeepImage, Picture, PixelFormat
from latentvae.data.reading import UnreadableImage, read_image
from latentvae.data.resampling import normalised
from latentvae.data.sample_photos import SamplePhotos
from latentvae.data.sampler import IndexSampler
from latentvae.data.split import Subset, open_images, open_source, some_of, spread
from latentvae.data.sprites import Sprites
from latentvae.data.stream import ImageStream, stream_loader
from latentvae.data.tar import TarShards
from latentvae.data.transforms import EvalTransform, TrainTransform, to_tensor

__all__ = [
    "EIGHT_BIT",
    "BadImages",
    "Batch",
    "BucketSampler",
    "Buckets",
    "DatasetSpec",
    "DeepImage",
    "EvalTransform",
    "HubImages",
    "ImageFolder",
    "ImageSource",
    "ImageStream",
    "IndexSampler",
    "Picture",
    "PixelFormat",
    "SamplePhotos",
    "Sprites",
    "Subset",
    "TarShards",
    "TrainImages",
    "TrainTransform",
    "UnreadableImage",
    "aspect_ratios",
    "assign",
    "bucket_sizes",
    "collate",
    "normalised",
    "open_images",
    "open_source",
    "read_image",
    "set_pixel_limit",
    "some_of",
    "spread",
    "stream_loader",
    "to_tensor",
    "train_loader",
    "validation_batches",
]
