"""Options of the images: where they are, what they become, how they are cut."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from latentvae.option_marks import (
    Count,
    DecidesTheWatch,
    MayChange,
    Positive,
    Private,
    Section,
    Share,
)


def _checked_resolution(value: Any) -> Any:
    """In one sentence, which pydantic has not for a union."""
    sides = value if isinstance(value, tuple | list) else (value, value)
    whole = all(isinstance(side, int) and side >= 1 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(
            f"resolution is {value!r}; it is one number of pixels, or height and width"
        )
    return value


class DataConfig(Section):
    """The images."""

    # Where images lie may change: what they are is compared apart (`data_identity`).
    train_data_dir: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Folder of images (sub-folders welcome), of tar shards or of parquet files, one of "
            "these files, a pattern such as shards/{000..012}.tar, or `samples` for the photos "
            "that come with scikit-image."
        ),
    )
    dataset_name: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Instead of train_data_dir, a data set of the Hub (owner/name), or a local one that "
            "`datasets` reads, with the options below."
        ),
    )
    dataset_config_name: Annotated[str | None, MayChange()] = Field(
        default=None, description="Configuration of the data set, where it has several."
    )
    dataset_split: Annotated[str, MayChange()] = Field(
        default="train",
        description="Split of the data set to train on; where there is one alone, `train` is that.",
    )
    image_column: Annotated[str | None, MayChange()] = Field(
        default=None, description="Column with the images, where the data set has several."
    )
    cache_dir: Annotated[str | None, MayChange(), Private()] = Field(
        default=None, description="Where `datasets` keeps what it downloads and prepares."
    )
    streaming: bool = Field(
        default=False,
        description=(
            "Read the data set row by row instead of downloading it; such a run resumes "
            "approximately."
        ),
    )
    # A stream resumes approximately in any case.
    shuffle_buffer: Annotated[Positive, MayChange()] = Field(
        default=1000, description="Images that wait in memory when streaming, drawn at random."
    )
    max_train_samples: Positive | None = Field(
        default=None,
        description="Train on at most so many images, the same ones for the same seed.",
    )
    validation_data_dir: Annotated[str | None, MayChange(), DecidesTheWatch()] = Field(
        default=None,
        description=(
            "Validation images, in any form that train_data_dir takes; without it a share of the "
            "training images is held out (when streaming, the first 256)."
        ),
    )
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.02,
        description=(
            "Share of the training folder held out for validation, by a hash of each "
            "file's name (at least one image)."
        ),
    )
    max_validation_images: Annotated[Positive, MayChange(), DecidesTheWatch()] = Field(
        default=1000, description="Validate on at most this many images, evenly spread."
    )
    image_channels: int = Field(
        default=3,
        description="Channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA, alpha is learned too).",
    )
    value_range: tuple[float, float] | None = Field(
        default=None,
        description=(
            "Stored numbers that become black and white, such as -1000 3000; those outside are "
            "clipped. By default 0 255 of 8-bit files and 0 65535 of wider integers; float files "
            "need it."
        ),
    )
    resolution: Annotated[int | tuple[int, int], BeforeValidator(_checked_resolution)] = Field(
        default=256,
        description=(
            "Side of the training crops in pixels, or their height and width; multiples of f."
        ),
    )
    aspect_ratio_buckets: Count = Field(
        default=0,
        description=(
            "Train on up to so many shapes from 1:2 to 2:1 of about as many pixels as resolution "
            "has, each image in the one nearest to its own and each batch of one; 0: all alike."
        ),
    )
    crop: Literal["random_resized", "random", "center"] = Field(
        default="random_resized",
        description=(
            "Training crop: a random area resized, or the shorter side resized and a "
            "random or centre crop. Validation: always centre."
        ),
    )
    crop_min_side: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.5,
        description=(
            "Smallest side of a random_resized crop, as a share of the image's shorter side."
        ),
    )
    random_flip: bool = Field(
        default=True, description="Mirror training images left to right at random."
    )
    image_interpolation_mode: Literal["bilinear", "bicubic", "lanczos"] = Field(
        default="lanczos", description="Pillow's kernel for resizing (antialiased)."
    )
    resize_with: Literal["torch", "pillow"] = Field(
        default="torch",
        description=(
            "Who resizes training crops of 8 bits: torch is several times as fast and rounds "
            "otherwise (one value in two hundred is one level of 255 off)."
        ),
    )
    jpeg_draft: bool = Field(
        default=True,
        description=(
            "Decode training JPEGs at 1/2, 1/4 or 1/8 of their size where twice the pixels that a "
            "crop needs are left."
        ),
    )
    crops_per_image: Positive = Field(
        default=1,
        description=(
            "Training crops taken of each image that is read; train_batch_size is a multiple of it."
        ),
    )
    dataloader_num_workers: Annotated[Count, MayChange()] = Field(
        default=0, description="Processes that read images; 0 reads them in the training process."
    )
    max_bad_share: Annotated[Share, MayChange()] = Field(
        default=0.01,
        description=(
            "Stop if more than this share of the training images (and more than one) cannot be "
            "read; up to it each is named once and replaced."
        ),
    )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        side = self.resolution
        return (side, side) if isinstance(side, int) else side

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.image_channels not in (1, 3, 4):
            raise ValueError(
                f"image_channels is {self.image_channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA)"
            )
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            low, high = self.value_range
            raise ValueError(
                f"value_range is {low:g} {high:g}; it is the number that becomes black and then a "
                "greater one that becomes white"
            )
        if self.train_data_dir is not None and self.dataset_name is not None:
            raise ValueError(
                f"train_data_dir '{self.train_data_dir}' and dataset_name '{self.dataset_name}' "
                "both name the training images; give one of them"
            )
        if self.streaming and self.dataset_name is None:
            raise ValueError("streaming needs dataset_name: local images are read by number")
        if self.streaming and self.dataset_name == "samples":
            raise ValueError(
                "streaming is for data sets, and dataset_name 'samples' are 13 photos on this "
                "machine; leave streaming out"
            )
        if self.streaming and self.aspect_ratio_buckets:
            raise ValueError(
                f"aspect_ratio_buckets {self.aspect_ratio_buckets} needs the sizes of all images "
                "before the first batch, which a stream does not have; leave streaming out"
            )
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                f"max_train_samples {self.max_train_samples} cannot be chosen from a stream; leave "
                "streaming out"
            )
        return self
