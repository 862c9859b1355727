"""Options that say where images are stored, how to read them, and how to crop them."""

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
    """Check the option `resolution`, and raise an error of one sentence if it is wrong.

    The error that pydantic itself raises for a union type has several lines.
    """
    sides = value if isinstance(value, tuple | list) else (value, value)
    whole = all(isinstance(side, int) and side >= 1 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(
            "resolution must be one number of pixels, or height and width, each at least 1 "
            f"(got {value!r})."
        )
    return value


class DataConfig(Section):
    """Options of the images: where they are stored, how they are read and how they are cropped."""

    # On resume, the folder of the images may have another path. `data_identity` checks that the
    # images are the same.
    train_data_dir: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Training images: a folder (with sub-folders) of images, of tar files or of parquet "
            "files. You may also give a single tar or parquet file, or a pattern such as "
            "shards/{000..012}.tar. `samples` means 21 photos that are installed with latentvae. "
            "`sprites` means 737,280 drawn grey images of 64 x 64 pixels, whose factors of "
            "variation (such as shape and position) are known."
        ),
    )
    dataset_name: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Training images from a data set of the Hugging Face Hub (owner/name), or from a local "
            "data set that the library `datasets` reads. Set only one of dataset_name and "
            "train_data_dir. The options dataset_config_name, dataset_split and image_column say "
            "which part of the data set to use."
        ),
    )
    dataset_config_name: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Name of the data set's configuration (see dataset_name). You must set "
            "dataset_config_name if the data set has several configurations."
        ),
    )
    dataset_split: Annotated[str, MayChange()] = Field(
        default="train",
        description=(
            "Split of the data set (see dataset_name) to train on. If the data set has only one "
            "split, `train` selects this split, even if it has another name."
        ),
    )
    image_column: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Column of the data set that holds the images (see dataset_name). You must set "
            "image_column if several columns hold images."
        ),
    )
    cache_dir: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description=(
            "Folder in which the library `datasets` stores downloaded and prepared data sets. By "
            "default, the library uses its own cache folder."
        ),
    )
    streaming: bool = Field(
        default=False,
        description=(
            "Read the data set (see dataset_name) row by row, without downloading all of it first. "
            "If you resume a training with streaming, it reads only approximately the same images "
            "as a training without interruption."
        ),
    )
    # This option may change on resume, because a resumed stream repeats the order of the images
    # only approximately, even with the same buffer.
    shuffle_buffer: Annotated[Positive, MayChange()] = Field(
        default=1000,
        description=(
            "Size of the shuffle buffer, if streaming is on: number of images that each worker "
            "process keeps in memory. The next training image is drawn at random from these "
            "images."
        ),
    )
    max_train_samples: Positive | None = Field(
        default=None,
        description=(
            "Train on at most this many images, chosen at random. The same seed chooses the same "
            "images. By default, all images are used."
        ),
    )
    validation_data_dir: Annotated[str | None, MayChange(), DecidesTheWatch()] = Field(
        default=None,
        description=(
            "Validation images, in any form that train_data_dir accepts. By default, some of the "
            "training images are held out for validation (see validation_share). With streaming, "
            "the first 256 images of the data set are held out for validation."
        ),
    )
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.02,
        description=(
            "Fraction of the training images that is held out for validation. A hash of the "
            "image's name decides whether an image is held out, so adding images does not change "
            "the choice for the other images. At least one image is held out for validation."
        ),
    )
    max_validation_images: Annotated[Positive, MayChange(), DecidesTheWatch()] = Field(
        default=1000,
        description=(
            "Largest number of images in a validation. If there are more validation images, this "
            "many are chosen at equal distances in the list of all validation images."
        ),
    )
    image_channels: int = Field(
        default=3,
        description=(
            "Number of image channels: 1 (grey), 3 (RGB) or 4 (RGBA). With 4, the network learns "
            "the transparency (alpha) too."
        ),
    )
    value_range: tuple[float, float] | None = Field(
        default=None,
        description=(
            "The two pixel values that mean black and white in the files, such as -1000 3000. "
            "Values outside this range are clipped. The default is 0 255 for 8-bit files, and 0 "
            "65535 for files of integers with more than 8 bits. You must set value_range for files "
            "with floating-point values."
        ),
    )
    all_pages: bool = Field(
        default=False,
        description=(
            "Use every page of a TIFF file as a separate image. By default, only the first page is "
            "used. If a page of a file is held out for validation, all pages of this file are held "
            "out. With very few files, pages of one file may be in both training and validation."
        ),
    )
    ignore_icc: bool = Field(
        default=False,
        description=(
            "Ignore embedded colour profiles (ICC) and train on the pixel values that the file "
            "stores. By default, images with such a profile are converted to sRGB."
        ),
    )
    resolution: Annotated[int | tuple[int, int], BeforeValidator(_checked_resolution)] = Field(
        default=256,
        description=(
            "Size of the training crops in pixels: one number for a square, or height and width. "
            "Height and width must be multiples of f, the downsampling factor of the network."
        ),
    )
    aspect_ratio_buckets: Count = Field(
        default=0,
        description=(
            "Train on up to this many aspect ratios, from 1:2 to 2:1. All crops have about as many "
            "pixels as a crop of the size that the option `resolution` gives. Each image gets the "
            "nearest aspect ratio, and all images of a batch have the same aspect ratio. With 0, "
            "all crops have the same size."
        ),
    )
    crop: Literal["random_resized", "random", "center"] = Field(
        default="random_resized",
        description=(
            "How training images are cropped. `random_resized` crops an area of random size at a "
            "random place and resizes it. `random` resizes the shorter side of the image and crops "
            "at a random place. `center` resizes the shorter side and crops the centre. Validation "
            "always crops the centre."
        ),
    )
    crop_min_side: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.5,
        description=(
            "Smallest side of the area that `random_resized` crops, as a fraction of the image's "
            "shorter side."
        ),
    )
    crop_max_side: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0,
        description=(
            "Largest side of the area that `random_resized` crops, as a fraction of the image's "
            "shorter side. With a small value, each crop shows only a small part of an image, so "
            "the model trains on fine details."
        ),
    )
    random_flip: bool = Field(
        default=True,
        description="Mirror each training image left to right with a probability of one half.",
    )
    image_interpolation_mode: Literal["bilinear", "bicubic", "lanczos"] = Field(
        default="lanczos",
        description=(
            "Filter for resizing images. The filters `bilinear`, `bicubic` and `lanczos` use "
            "antialiasing, as in Pillow."
        ),
    )
    resize_with: Literal["torch", "pillow"] = Field(
        default="torch",
        description=(
            "Library that resizes training crops of 8-bit images. `torch` is several times as fast "
            "as `pillow`. The results of the two libraries differ only by rounding: about one "
            "pixel value in 200 differs, by 1 on the scale from 0 to 255."
        ),
    )
    jpeg_draft: bool = Field(
        default=True,
        description=(
            "Decode training JPEGs at 1/2, 1/4 or 1/8 of their height and width, which is faster "
            "than decoding at full size. A JPEG is decoded at a smaller size only if each side "
            "then still has at least twice as many pixels as the crop needs."
        ),
    )
    max_pixels: Positive | None = Field(
        default=None,
        description=(
            "Largest number of pixels (width times height) that an image may have. The default is "
            "Pillow's limit, 89 million. A larger image counts as unreadable (see max_bad_share). "
            "The limit exists because even a small file can fill the memory when it is decoded."
        ),
    )
    crops_per_image: Positive = Field(
        default=1,
        description=(
            "Number of training crops from each image. With more crops, fewer images must be read "
            "from disk. train_batch_size must be a multiple of crops_per_image."
        ),
    )
    dataloader_num_workers: Annotated[Count, MayChange()] = Field(
        default=0,
        description=(
            "Number of worker processes that read images for each training process. With 0, the "
            "training process itself reads the images."
        ),
    )
    max_bad_share: Annotated[Share, MayChange()] = Field(
        default=0.01,
        description=(
            "Largest fraction (0 to 1) of the training images that may be unreadable. If a larger "
            "fraction (and at least two images) cannot be read, the training stops with an error. "
            "Otherwise each unreadable image is reported once and replaced by another image."
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
                "value_range must be the pixel value that becomes black, then a greater one that "
                f"becomes white (got {low:g} {high:g})."
            )

        if self.crop_min_side > self.crop_max_side:
            raise ValueError(
                f"crop_min_side must be at most crop_max_side (got {self.crop_min_side:g} and "
                f"{self.crop_max_side:g})."
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
                "streaming needs dataset_name, and train_data_dir does not support it. Leave "
                "streaming out."
            )
        if self.streaming and self.dataset_name in ("samples", "sprites"):
            raise ValueError(
                f"streaming is for downloads, but the images of dataset_name '{self.dataset_name}' "
                "are on this machine. Leave streaming out."
            )
        if self.streaming and self.aspect_ratio_buckets:
            raise ValueError(
                f"aspect_ratio_buckets {self.aspect_ratio_buckets} needs the sizes of all images "
                "before the first batch, and streaming does not know them. Leave streaming out."
            )
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                f"max_train_samples {self.max_train_samples} does not work with streaming. Leave "
                "streaming out."
            )
        return self
