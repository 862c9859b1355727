"""Define the part of a task that reads images: data, batches, and unreadable files."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from latentvae.data import BadImages, Batch, ImageSource, ImageStream, aspect_ratios, some_of
from latentvae.distributed import gather_objects, rank, world_size
from latentvae.engine.task import Task
from latentvae.errors import UserError, printable
from latentvae.tasks.autoencoder.images import (
    batches,
    data_identity,
    eval_transform,
    image_buckets,
    image_sampler,
    open_data,
)
from latentvae.tasks.autoencoder.validate import readable_images


class ImageTask(Task):
    """Base class of a task on images.

    A subclass calls `open_images` in its method `open`, `begin_images` in `build`, and `saw` in
    `micro_step`.

    Attributes:
        train_images: opened source of training images.
        validation_images: opened source of validation images.
        bad, bad_validation: unreadable training files and validation files so far.
    """

    config: Any  # an ImageJobConfig
    unit = "images"
    data_advice = (
        "store the images smaller, or try --crops_per_image 2 (two crops from each image, so "
        "half as many images are read)"
    )

    train_images: ImageSource | ImageStream
    validation_images: ImageSource

    # before the run

    def open_images(self) -> None:
        """Open the training and validation images."""
        self.train_images, self.validation_images = open_data(self.config)
        self._identity = data_identity(self.train_images)
        self._ratios: Any = None

    def begin_images(self) -> None:
        """Start with no record of unreadable files."""
        self.bad, self.bad_validation = BadImages(), BadImages()
        # bad images of this rank since the last row of the log
        self._unnamed: list[tuple[str, str]] = []
        self._micro_steps = 0

    def check_processes(self, processes: int) -> None:
        if not isinstance(self.train_images, ImageStream):
            # The sampler raises an error if there are more ranks than batches.
            place = {"rank": 0, "world_size": processes, "start_step": 0, "seed": 0}
            image_sampler(self.config, len(self.train_images), None, **place)

    def batches(self, *, start_step: int) -> Iterable[Batch]:
        loader, self.steps_per_epoch = batches(
            self.config,
            self.train_images,
            start_step=start_step,
            pin_memory=self.device.type == "cuda",
        )
        self._micro_steps = start_step
        return loader

    def check_ready(self) -> None:
        validated = some_of(self.validation_images, self.config.data.max_validation_images)
        readable_images(validated, eval_transform(self.config), count=1)

    def identity(self) -> dict[str, Any]:
        return self._identity

    @property
    def num_workers(self) -> int:
        return self.config.data.dataloader_num_workers

    @property
    def items_read(self) -> int:
        return self.config.images_read

    def step_size(self) -> str:
        height, width = self.config.data.size
        return f"train_batch_size {self.config.run.train_batch_size} at {height} x {width} px"

    # an update

    def saw(self, batch: Batch) -> None:
        """Remember the unreadable files of a batch, and count the batch."""
        self._unnamed += batch.bad
        self._micro_steps += 1

    def keys(self, batch: Batch) -> Tensor:
        return batch.indices

    def names(self, keys: Tensor) -> list[str]:
        images = self.train_images
        if isinstance(images, ImageStream):
            return [f"row {number} of process {rank()}'s stream" for number in keys.tolist()]
        return [printable(images.name(number)) for number in keys.tolist()]

    # between updates

    def name_bad_images(self) -> None:
        """Print each unreadable training file once, even if several ranks found it.

        Raises:
            UserError: there are more unreadable files than max_bad_share allows.
        """
        for found in gather_objects(self._unnamed):
            for name, reason in self.bad.update(found):
                self.say(
                    f"cannot read {printable(name)} ({printable(reason)}). Another image replaces "
                    "this file."
                )
        self._unnamed = []

        images = self.train_images
        if isinstance(images, ImageStream):
            seen = self._micro_steps * self.config.images_read * world_size()
            total = images.num_images or max(seen, 1)
        else:
            total = len(images)
        self.bad.check(total, self.config.data.max_bad_share)

    def name_bad_validation_images(self, bad: BadImages) -> None:
        """Print each unreadable validation file once, even if several ranks found it."""
        for found in gather_objects(list(bad.reasons.items())):
            for name, reason in self.bad_validation.update(found):
                self.say(f"cannot validate on {printable(name)} ({printable(reason)})")

    # proofs

    def check_repeatable(self) -> None:
        if isinstance(self.train_images, ImageStream):
            raise UserError(
                "a run with --streaming resumes only approximately, so its resume cannot be "
                "verified. Leave --streaming out."
            )

    def order(self, *, rank: int, processes: int, start: int, stop: int) -> list[Any] | None:
        images, config = self.train_images, self.config.for_processes(processes)
        if isinstance(images, ImageStream):
            return None
        if self._ratios is None and config.data.aspect_ratio_buckets:
            self._ratios = aspect_ratios(images)
        buckets = image_buckets(config, self._ratios, processes=processes)
        place = {"rank": rank, "world_size": processes, "start_step": start}
        sampler = image_sampler(config, len(images), buckets, **place, seed=config.run.seed)
        return [step for _, step in zip(range(start, stop), sampler, strict=False)]
