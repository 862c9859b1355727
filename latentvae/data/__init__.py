"""Images from files to batches: reading, folders, transforms, order, loaders."""

from latentvae.data.bad_images import BadImages
from latentvae.data.dataset import (
    Batch,
    TrainImages,
    collate,
    train_loader,
    validation_batches,
)
from latentvae.data.folder import ImageFolder, ImageSource, SamplePhotos
from latentvae.data.reading import UnreadableImage, read_image
from latentvae.data.sampler import IndexSampler
from latentvae.data.split import open_images, open_source
from latentvae.data.transforms import EvalTransform, TrainTransform, to_tensor

__all__ = [
    "BadImages",
    "Batch",
    "EvalTransform",
    "ImageFolder",
    "ImageSource",
    "IndexSampler",
    "SamplePhotos",
    "TrainImages",
    "TrainTransform",
    "UnreadableImage",
    "collate",
    "open_images",
    "open_source",
    "read_image",
    "to_tensor",
    "train_loader",
    "validation_batches",
]
