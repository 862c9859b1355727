"""Options of the images: where they lie, how they are read, and how they are cropped."""

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
    """Check the resolution here, because pydantic reports a union in several lines."""
    sides = value if isinstance(value, tuple | list) else (value, value)
    whole = all(isinstance(side, int) and side >= 1 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(
            "resolution must be one number of pixels, or height and width, each at least 1 "
            f"(got {value!r})."
        )
    return value


class DataConfig(Section):
    """Where the images lie, how they are read, and how they are cropped."""

    # The place of the images may change on resume. `data_identity` compares the images themselves.
    train_data_dir: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "The training images: a folder of images (with sub-folders), of tar shards or "
            "of parquet files. Or one such file, a pattern such as shards/{000..012}.tar, or "
            "`samples` for the photos that come with scikit-image."
        ),
    )
    dataset_name: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "A data set of the Hub (owner/name), or a local one that `datasets` reads. Give it "
            "instead of train_data_dir. The options below refine it."
        ),
    )
    dataset_config_name: Annotated[str | None, MayChange()] = Field(
        default=None, description="Configuration of the data set. Needed if it has several."
    )
    dataset_split: Annotated[str, MayChange()] = Field(
        default="train",
        description=(
            "Split of the data set to train on. A data set with only one split is also opened by "
            "`train`."
        ),
    )
    image_column: Annotated[str | None, MayChange()] = Field(
        default=None,
        description="Column with the images. Needed if the data set has several such columns.",
    )
    cache_dir: Annotated[str | None, MayChange(), Private()] = Field(
        default=None, description="Folder where `datasets` keeps what it downloads and prepares."
    )
    streaming: bool = Field(
        default=False,
        description=(
            "Read the data set row by row instead of downloading it. Such a run resumes only "
            "approximately."
        ),
    )
    # May change on resume, because a stream resumes only approximately in any case.
    shuffle_buffer: Annotated[Positive, MayChange()] = Field(
        default=1000,
        description="Number of images kept in memory when streaming. The next is drawn from them.",
    )
    max_train_samples: Positive | None = Field(
        default=None,
        description="Train on at most this many images, the same ones for the same seed.",
    )
    validation_data_dir: Annotated[str | None, MayChange(), DecidesTheWatch()] = Field(
        default=None,
        description=(
            "Validation images, in any form that train_data_dir takes. By default a share of the "
            "training images is held out (when streaming, the first 256)."
        ),
    )
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.02,
        description=(
            "Share of the training images held out for validation, chosen by a hash of each "
            "file's name. At least one image is held out."
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
            "Stored numbers that become black and white, such as -1000 3000. Numbers outside are "
            "clipped. By default 0 255 for 8-bit files and 0 65535 for wider integers. Float files "
            "need this option."
        ),
    )
    all_pages: bool = Field(
        default=False,
        description=(
            "Use every page of a TIFF as an image of its own. By default the first page is used. "
            "All pages of a file are held out together."
        ),
    )
    ignore_icc: bool = Field(
        default=False,
        description=(
            "Train on the stored numbers of files with an embedded colour profile. By default they "
            "are converted to sRGB."
        ),
    )
    resolution: Annotated[int | tuple[int, int], BeforeValidator(_checked_resolution)] = Field(
        default=256,
        description=(
            "Side of the training crops in pixels, or their height and width. Each side must be a "
            "multiple of f, the downsampling factor."
        ),
    )
    aspect_ratio_buckets: Count = Field(
        default=0,
        description=(
            "Train on up to this many shapes from 1:2 to 2:1, each with about as many pixels as "
            "resolution. Each image goes to the nearest shape, and a batch has one shape. "
            "0 trains on one shape."
        ),
    )
    crop: Literal["random_resized", "random", "center"] = Field(
        default="random_resized",
        description=(
            "Training crop. `random_resized` resizes a random area. `random` and `center` resize "
            "the shorter side and crop anywhere or in the centre. Validation always crops the "
            "centre."
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
            "Library that resizes training crops of 8 bits. torch is several times as fast as "
            "pillow and rounds differently: one value in 200 differs by one level of 255."
        ),
    )
    jpeg_draft: bool = Field(
        default=True,
        description=(
            "Decode training JPEGs at 1/2, 1/4 or 1/8 of their size where twice the pixels that a "
            "crop needs are left."
        ),
    )
    max_pixels: Positive | None = Field(
        default=None,
        description=(
            "Largest image that is read, in pixels (width times height). Default: Pillow's limit, "
            "89 million. Larger files are bad images, because small files can fill the memory."
        ),
    )
    crops_per_image: Positive = Field(
        default=1,
        description=(
            "Training crops taken of each image that is read. train_batch_size must be a multiple "
            "of it."
        ),
    )
    dataloader_num_workers: Annotated[Count, MayChange()] = Field(
        default=0, description="Processes that read images. 0 reads them in the training process."
    )
    max_bad_share: Annotated[Share, MayChange()] = Field(
        default=0.01,
        description=(
            "Stop if more than this share of the training images (and more than one) cannot be "
            "read. Below it each unreadable image is named once and replaced by another."
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
                f"image_channels must be 1 (grey), 3 (RGB) or 4 (RGBA) (got {self.image_channels})."
            )
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            low, high = self.value_range
            raise ValueError(
                "value_range must be the number that becomes black, then a greater one that "
                f"becomes white (got {low:g} {high:g})."
            )

        # one source
        if self.train_data_dir is not None and self.dataset_name is not None:
            raise ValueError(
                f"train_data_dir '{self.train_data_dir}' and dataset_name '{self.dataset_name}' "
                "both name the training images. Give only one of them."
            )

        # streams
        if self.streaming and self.dataset_name is None:
            raise ValueError(
                "streaming needs dataset_name, because local images are read by number. Leave "
                "streaming out."
            )
        if self.streaming and self.dataset_name == "samples":
            raise ValueError(
                "streaming is for data sets, but dataset_name 'samples' are 13 photos on this "
                "machine. Leave streaming out."
            )
        if self.streaming and self.aspect_ratio_buckets:
            raise ValueError(
                f"aspect_ratio_buckets {self.aspect_ratio_buckets} needs the sizes of all images "
                "before the first batch, and a stream does not know them. Leave streaming out."
            )
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                f"max_train_samples {self.max_train_samples} cannot be chosen from a stream. Leave "
                "streaming out."
            )
        return self
