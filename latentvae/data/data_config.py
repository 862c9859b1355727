"""Options of the images: where they are stored, how they are read, and how they are cropped."""

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
    """Check the resolution here, because pydantic's error for a union has several lines."""
    sides = value if isinstance(value, tuple | list) else (value, value)
    whole = all(isinstance(side, int) and side >= 1 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(
            "resolution must be one number of pixels, or height and width, each at least 1 "
            f"(got {value!r})."
        )
    return value


class DataConfig(Section):
    """Where the images are stored, how they are read, and how they are cropped."""

    # The folder of the images may change on resume. `data_identity` compares the images themselves.
    train_data_dir: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "The training images: a folder of images (with sub-folders), of tar shards or of "
            "parquet files. Other forms are a single such file, a pattern such as "
            "shards/{000..012}.tar, or `samples` for the photos that come with scikit-image."
        ),
    )
    dataset_name: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "A data set of the Hub (owner/name), or a local data set that the library `datasets` "
            "reads. Give it instead of train_data_dir. The options dataset_config_name, "
            "dataset_split and image_column choose its parts."
        ),
    )
    dataset_config_name: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Configuration of the data set dataset_name. Needed if the data set has several."
        ),
    )
    dataset_split: Annotated[str, MayChange()] = Field(
        default="train",
        description=(
            "Split of the data set dataset_name to train on. If a data set has only one split, "
            "`train` also selects it."
        ),
    )
    image_column: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Column with the images in dataset_name. Needed if several columns hold images."
        ),
    )
    cache_dir: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description="Folder where the library `datasets` keeps downloaded and prepared data sets.",
    )
    streaming: bool = Field(
        default=False,
        description=(
            "Read the data set dataset_name row by row instead of downloading it. A streaming run "
            "resumes only approximately."
        ),
    )
    # This option may change on resume, because a stream resumes only approximately in any case.
    shuffle_buffer: Annotated[Positive, MayChange()] = Field(
        default=1000,
        description=(
            "Number of images kept in memory when streaming. The next image is drawn at random "
            "from these images."
        ),
    )
    max_train_samples: Positive | None = Field(
        default=None,
        description="Train on at most this many images. The same seed chooses the same images.",
    )
    validation_data_dir: Annotated[str | None, MayChange(), DecidesTheWatch()] = Field(
        default=None,
        description=(
            "Validation images, in any form that train_data_dir takes. By default a share of the "
            "training images is held out. When streaming, the first 256 images are held out."
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
        default=1000,
        description=(
            "Validate on at most this many images, spread evenly over the validation images."
        ),
    )
    image_channels: int = Field(
        default=3,
        description=(
            "Number of image channels: 1 (grey), 3 (RGB) or 4 (RGBA, alpha is learned too)."
        ),
    )
    value_range: tuple[float, float] | None = Field(
        default=None,
        description=(
            "The stored number that becomes black and the one that becomes white, such as -1000 "
            "3000. Numbers outside this range are clipped. Default: 0 255 for 8-bit files and 0 "
            "65535 for wider integers. Float files need this option."
        ),
    )
    all_pages: bool = Field(
        default=False,
        description=(
            "Use every page of a TIFF as an image of its own. By default only the first page is "
            "used. The validation images get all pages of a file or none."
        ),
    )
    ignore_icc: bool = Field(
        default=False,
        description=(
            "Train on the stored numbers of files with an embedded colour profile. By default such "
            "files are converted to sRGB."
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
            "Train on up to this many image shapes from 1:2 to 2:1. Each shape has about as many "
            "pixels as the option resolution gives. Each image goes to the nearest shape, and all "
            "images of a batch have one shape. 0 trains on one shape."
        ),
    )
    crop: Literal["random_resized", "random", "center"] = Field(
        default="random_resized",
        description=(
            "Training crop. `random_resized` resizes an area of random size and place. `random` "
            "resizes the shorter side and crops at a random place. `center` resizes the shorter "
            "side and crops the centre. Validation always crops the centre."
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
        default="lanczos", description="Pillow's filter for resizing images (antialiased)."
    )
    resize_with: Literal["torch", "pillow"] = Field(
        default="torch",
        description=(
            "Library that resizes training crops of 8-bit images. torch is several times as fast "
            "as pillow. The two libraries round differently: one value in 200 differs by one of "
            "the 255 levels."
        ),
    )
    jpeg_draft: bool = Field(
        default=True,
        description=(
            "Decode training JPEGs at 1/2, 1/4 or 1/8 of their size if that leaves at least twice "
            "the pixels that a crop needs."
        ),
    )
    max_pixels: Positive | None = Field(
        default=None,
        description=(
            "Largest image that is read, in pixels (width times height). Default: Pillow's limit, "
            "89 million. A larger image counts as unreadable, because a small file can fill the "
            "memory."
        ),
    )
    crops_per_image: Positive = Field(
        default=1,
        description=(
            "Number of training crops taken from each image that is read. train_batch_size must be "
            "a multiple of crops_per_image."
        ),
    )
    dataloader_num_workers: Annotated[Count, MayChange()] = Field(
        default=0,
        description="Number of processes that read images. 0 reads images in the training process.",
    )
    max_bad_share: Annotated[Share, MayChange()] = Field(
        default=0.01,
        description=(
            "Stop if more than this share of the training images (and more than one image) cannot "
            "be read. If fewer images fail, each is named once and replaced by another image."
        ),
    )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of training crops, in pixels."""
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

        # one source of images
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
