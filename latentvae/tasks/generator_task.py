"""Define what all tasks that train a generator share: batches, classes, and the export.

A generator learns from a table of latents or tokens in memory (`tasks.shards`). See `tasks.prior`
and `tasks.flow`.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentvae.data import IndexSampler, spread
from latentvae.distributed import rank, world_size
from latentvae.engine.task import Task
from latentvae.errors import UserError
from latentvae.priors.transformer import NO_CLASS

MAX_ROWS = 10  # largest number of classes or captions in a picture of samples


class SampleRows(NamedTuple):
    """Conditions of the images in a picture of samples. A row shows images of one condition.

    A condition is a class or a caption.

    Attributes:
        classes: class of each image, or `NO_CLASS` if the condition is not "class".
        captions: caption of each image, or an empty list if the condition is not "text".
        labels: label of each row, or None if the condition is "none".
    """

    classes: Tensor
    captions: list[str]
    labels: list[str] | None


class GeneratorTask(Task):
    """Base class of a task that trains a generator on latents or tokens in memory.

    Attributes:
        data: latents or tokens to train on (`data.train`) and to validate on (`data.validation`).
            `data.content` describes them, for example by the names of the classes.
        condition: the condition that the model gets with an image: "class", "text" or "none".
    """

    config: Any
    data: Any
    condition: str
    unit = "images"

    def count_classes(self) -> int:
        """Return the number of classes.

        This is the number of class names. Without class names, this is the largest class number of
        the training images plus 1.

        Raises:
            UserError: the class number of a validation image is not below the number of classes.
        """
        names, data = self.data.content.class_names, self.data
        count = int(data.train.classes.max()) + 1 if names is None else len(names)
        if (other := int(data.validation.classes.max())) >= count:
            raise UserError(
                f"a validation image has class {other}, but the training images have "
                f"{count} classes, from 0 to {count - 1}. Validate on images of the same classes."
            )
        return count

    def check_processes(self, processes: int) -> None:
        self._sampler(rank=0, processes=processes, start=0)  # raises if a rank has no batch

    def _sampler(self, *, rank: int, processes: int, start: int) -> IndexSampler:
        return IndexSampler(
            len(self.data.train),
            self.config.run.train_batch_size,
            seed=self.config.run.seed,
            rank=rank,
            world_size=processes,
            start_step=start,
        )

    def batches(self, *, start_step: int) -> Iterable[Any]:
        sampler = self._sampler(rank=rank(), processes=world_size(), start=start_step)
        self.steps_per_epoch = sampler.steps_per_epoch
        return self._rows(sampler)

    def _rows(self, sampler: IndexSampler) -> Iterator[Any]:
        for places in sampler:
            yield self.data.train.rows([index for _, index in places])

    @cached_property
    def other_captions(self) -> dict[str, str]:
        """Dict from each validation caption to a wrong caption.

        In the sorted list of captions, the wrong caption is half the list away. If there is only
        one caption, the dict maps it to itself.
        """
        texts = sorted(set(self.data.validation.captions))
        return {text: texts[(i + len(texts) // 2) % len(texts)] for i, text in enumerate(texts)}

    def sample_rows(self, num_classes: int) -> SampleRows:
        """Return the classes or captions of the images in a picture of samples.

        The chosen classes or captions are evenly spread over all classes or validation captions.

        Args:
            num_classes: number of classes of the model.
        """
        count, names = self.config.run.num_sample_images, self.data.content.class_names
        none = torch.full((count,), NO_CLASS)
        if self.condition == "none":
            return SampleRows(none, [], None)

        held = list(dict.fromkeys(self.data.validation.captions))  # each text once
        total = num_classes if self.condition == "class" else len(held)
        chosen = spread(total, min(MAX_ROWS, count))
        columns = count // len(chosen)
        if self.condition == "class":
            labels = [names[i] if names else f"class {i}" for i in chosen]
            return SampleRows(torch.tensor(chosen).repeat_interleave(columns), [], labels)
        captions = [held[i] for i in chosen]
        repeated = [caption for caption in captions for _ in range(columns)]
        return SampleRows(none[: len(repeated)], repeated, captions)

    def memory_advice(self) -> list[str]:
        advice = super().memory_advice()
        if not self.config.run.gradient_checkpointing:
            advice.append("--gradient_checkpointing (slower)")
        return advice

    def has_export(self, out: Path) -> bool:
        return (out / "model_index.json").is_file()

    def done(self, out: Path) -> str:
        return f"done: {out}. `latentvae sample {out} --out pictures` draws pictures."

    def order(self, *, rank: int, processes: int, start: int, stop: int) -> list[Any]:
        sampler = self._sampler(rank=rank, processes=processes, start=start)
        return [step for _, step in zip(range(start, stop), sampler, strict=False)]
