"""Define options that every training on images has: the section `data`, and image sizes."""

from typing import TYPE_CHECKING

from latentvae.config.run_config import JobConfig
from latentvae.data.buckets import bucket_sizes
from latentvae.data.data_config import DataConfig


class ImageJobConfig(JobConfig):
    """Base class of the options of a run on images. A subclass declares the section `data`."""

    if TYPE_CHECKING:
        data: DataConfig = DataConfig()

    @property
    def bucket_multiple(self) -> int:
        """Number of pixels that divides the height and the width of every aspect-ratio bucket."""
        raise NotImplementedError  # Each subclass computes this number from its own options.

    @property
    def batch_multiple(self) -> int:
        return self.data.crops_per_image

    @property
    def images_read(self) -> int:
        """Number of images that a process reads for one batch, to cut crops from these images."""
        return self.run.train_batch_size // self.data.crops_per_image

    @property
    def train_sizes(self) -> tuple[tuple[int, int], ...]:
        """All image sizes (height, width) that occur in training, in pixels."""
        return self.sizes_at(self.data.size)

    def sizes_at(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Return the image sizes of training (`train_sizes`) at the resolution `size` (pixels)."""
        if not self.data.aspect_ratio_buckets:
            return (size,)
        return bucket_sizes(size, self.data.aspect_ratio_buckets, multiple=self.bucket_multiple)

    def check_batch(self) -> None:
        """Raise ValueError unless crops_per_image divides train_batch_size.

        With global_batch_size, train_batch_size is only an upper limit, so it is not checked here.
        """
        batch, crops = self.run.train_batch_size, self.data.crops_per_image
        if batch % crops and self.run.global_batch_size is None:
            near = max(round(batch / crops), 1) * crops
            raise ValueError(
                f"train_batch_size {batch} is not a multiple of crops_per_image {crops}. The "
                f"nearest multiple is {near}."
            )
