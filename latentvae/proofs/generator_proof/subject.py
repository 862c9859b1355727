"""Define the interface of a folder of codes that `latentvae prove` examines.

Codes are latents or tokens. A *variant* is either the unchanged codes (`code`) or a control. A
control is a change of the codes that should make the generator better or worse in a known way.

`n` images, `B` batch.
"""

import contextlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentvae.data import EvalTransform, PixelFormat
from latentvae.engine.log import read_rows
from latentvae.engine.loop import train
from latentvae.engine.task import Task
from latentvae.errors import UserError
from latentvae.latents.formats.shards import Content
from latentvae.latents.items import Pictures, open_items
from latentvae.latents.opening import open_model
from latentvae.latents.shard_dataset import LatentDataset, TokenDataset
from latentvae.proofs.generator_proof.settings import ProofSettings
from latentvae.tasks.shards import ItemTable

CODE = "code"  # name of the unchanged codes


@dataclass(frozen=True)
class Photos:
    """Real pictures with their classes and names.

    Attributes:
        images: (n, C, H, W) in [-1, 1], as they were encoded.
        classes: (n,), int64, -1 for an image without a class.
        names: name of each picture.
    """

    images: Tensor
    classes: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.images)


class Subject(ABC):
    """A folder of latents or tokens, split into training and held-out images.

    `latentvae prove` trains generators on the unchanged codes and on controls, which are changed
    copies. The unchanged codes and each control are called variants.

    Args:
        shards: the opened folder.
        table: all latents or tokens of the folder.
        settings: settings of the proof.
        name: name of the folder in the results.
        data: the images that were encoded. With None, the images' path in the folder's
            manifest is used.
        model: the autoencoder. With None, the autoencoder in the folder's manifest is used.

    Attributes:
        tables: the latents or tokens of the training images and of the held-out images.
        name: name of the folder in the results.
        content: facts from the folder's manifest, such as the shape of an image's latent or tokens.
        train, held: the real training pictures and the real held-out pictures.
        num_classes: number of classes, 0 without classes.
        variants: dict from the name of each variant to a description of its change.
    """

    kind: ClassVar[str]
    variants: ClassVar[dict[str, str]]
    tunes_shift: ClassVar[bool] = False

    def __init__(
        self,
        shards: LatentDataset | TokenDataset,
        table: Any,
        settings: ProofSettings,
        *,
        name: str,
        data: str | None,
        model: str | None,
    ) -> None:
        self.settings, self.name = settings, name
        self.content, manifest = shards.content, shards.reader.manifest
        folder = shards.reader.folder

        # the split, and the pictures
        parts = table.split(share=settings.held_out, seed=0)
        self.tables = tuple(part.at_most(settings.max_images) for part in parts)
        check_memory(self.content, sum(map(len, self.tables)), folder=folder)
        self.train, self.held = (
            read_photos(self.content, data or manifest.data, part, shards=folder)
            for part in self.tables
        )
        names, known = self.content.class_names, self.tables[0].classes
        self.num_classes = 0
        if bool((known >= 0).any()):
            self.num_classes = int(known.max()) + 1 if names is None else len(names)

        # the autoencoder
        self.autoencoder = open_model(model or manifest.model, device=None)
        if self.autoencoder.info()["weights_sha256"] != self.content.model_sha256:
            raise UserError(
                f"'{self.autoencoder.name}' has other weights than the model that encoded "
                f"'{folder}' ('{manifest.model}'). Give that model with --models."
            )

    @abstractmethod
    def task(self, variant: str, *, folder: Path, seed: int, shift: float) -> Task:
        """Return the task that trains a generator on a variant (the codes or a changed copy)."""

    @abstractmethod
    def sample(
        self,
        variant: str,
        generator: Path,
        classes: Tensor,
        *,
        shift: float,
        seed: int,
        guidance: float = 1.0,
    ) -> Iterator[Tensor]:
        """Draw pictures in batches (B, C, H, W) in [-1, 1].

        Args:
            variant: name of the variant (unchanged codes or a control) that the generator learned.
            generator: folder that the training exported.
            classes: class of each picture, (n,).
            shift: shift of the noise levels.
            seed: seed of the random numbers.
            guidance: weight of classifier-free guidance. 1 is no guidance.
        """

    @abstractmethod
    def reconstructed(self, *, held: bool) -> Iterator[Tensor]:
        """Decode the unchanged codes of the real images, in batches (B, C, H, W) in [-1, 1].

        With `held`, the held-out images are decoded instead of the training images.
        """

    @abstractmethod
    def untrained(self, classes: Tensor, *, seed: int) -> Iterator[Tensor]:
        """Draw pictures from a generator that has learned nothing."""

    def fit(self, variant: str, *, folder: Path, seed: int, shift: float) -> Path:
        """Train a generator, or continue its training. Return the folder of the exported generator.

        Everything that the training prints is written to `training.txt` in the run's folder.
        """
        run = folder / f"{variant}-seed{seed}" / f"shift{shift:g}"
        run.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            export = train(self.task(variant, folder=run, seed=seed, shift=shift))
        (run / "training.txt").write_text(text.getvalue(), encoding="utf-8")
        return export

    def facts(self, export: Path) -> dict[str, float]:
        """Return the last validation metrics of a training, without the prefix `validation/`."""
        rows = read_rows(export.parent / "log.jsonl")
        last = next((r for r in reversed(rows) if "validation/images" in r), {})
        return {
            name.removeprefix("validation/"): value
            for name, value in last.items()
            if name.startswith("validation/") and name != "validation/images"
        }

    def own_classes(self) -> Tensor:
        """Return a class for each sample, (n,). Classes are as frequent as in the training images.

        If there are no classes, all values are -1.
        """
        count, known = self.settings.samples, self.tables[0].classes
        if not self.num_classes:
            return torch.full((count,), -1)
        return known.sort().values[torch.arange(count) * len(known) // count]

    def even_classes(self) -> Tensor:
        """Return a class for each sample, (n,). All classes are equally frequent."""
        return torch.arange(self.settings.samples) % self.num_classes

    @abstractmethod
    def forget(self, variant: str) -> None:
        """Free the memory that a variant (the codes or a changed copy) takes."""


def check_memory(content: Content, count: int, *, folder: Path) -> None:
    """Raise UserError if `count` pictures need more than half of the machine's memory."""
    height, width = content.size
    each = 4 * content.image_channels * height * width * 2  # in memory twice while read
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if count * each > memory / 2:
        raise UserError(
            f"the {count:,} pictures of '{folder}' need {count * each / 2**30:.1f} GiB, more than "
            f"half of the memory. Give --max_images {max(int(memory / 2 / each / 1.2), 20)}."
        )


def read_photos(content: Content, data: str, items: ItemTable, *, shards: Path) -> Photos:
    """Read the pictures that were encoded, by their names.

    Raises:
        UserError: a picture is missing in the data, or cannot be read.
    """
    pixels = PixelFormat(
        content.image_channels,
        content.value_range,
        ignore_icc=content.ignore_icc,
        max_pixels=content.max_pixels,
    )
    source = open_items(data, pixels=pixels)
    transform = EvalTransform(content.resolution, interpolation=content.interpolation)
    pictures = Pictures(source, transform, flip=content.flip)
    places = {source.name(number): number for number in range(len(source))}
    names = items.names
    missing = [name for name in names if name not in places]
    if missing:
        raise UserError(
            f"data '{data}' lacks {len(missing):,} of {len(names):,} images of '{shards}', such as "
            f"'{missing[0]}'. Use --data to give the images that were encoded."
        )

    images = []
    for name in names:
        picture = pictures[places[name]]
        if picture.image is None:
            raise UserError(f"'{name}' in data '{data}' cannot be read: {picture.reason}.")
        images.append(picture.image)
    return Photos(torch.stack(images), items.classes, names)


def batches(total: int, size: int) -> Iterator[range]:
    """Yield the numbers 0..total - 1 in ranges of at most `size` numbers."""
    for start in range(0, total, size):
        yield range(start, min(start + size, total))


def proof_run(settings: ProofSettings, *, folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Return the options of a generator's training, as a dict from sections to options."""
    return {
        "optimizer": {
            "learning_rate": settings.learning_rate,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": min(50, settings.updates // 4),
            "ema_decay": 0.99,
        },
        "run": {
            "output_dir": str(folder),
            "max_train_steps": settings.updates,
            "train_batch_size": settings.batch_size,
            "eval_batch_size": settings.batch_size,
            "checkpointing_steps": max(settings.updates // 4, 1),
            "checkpoints_total_limit": 1,
            "validation_steps": settings.updates,
            "log_steps": max(settings.updates // 20, 1),
            "mixed_precision": "auto",
            "seed": seed,
        },
    }
