"""Measure how well likelihoods under a VAE separate one kind of images from another.

    python benchmarks/image_anomaly.py pairs --model runs/vae --background runs/vae-perturbed \\
        --normal cifar/validation.parquet --others mnist/test.parquet --out out

    python benchmarks/image_anomaly.py classes --train mnist/train.parquet \\
        --test mnist/test.parquet --out out

The command `pairs` scores unseen normal images, and images of other data sets. The command
`classes` trains, for each class, a VAE on all other classes, and scores test images of all classes.
Both commands print the AUROC of the likelihood alone, and of the likelihood corrected by image
complexity or by a background model (a VAE trained on images with some random pixels). If you run
the command again, finished trainings are not repeated.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm

import latentvae
from latentvae.anomaly.image_methods import ImageOptions, Likelihood
from latentvae.cli.flags import exit_with, parse_options
from latentvae.config.presets import load_preset
from latentvae.data import BadImages, EvalTransform, ImageSource, PixelFormat, some_of
from latentvae.data.split import Subset
from latentvae.engine.loop import train
from latentvae.errors import UserError
from latentvae.latents.items import find_labels, open_items
from latentvae.models.likelihood_models import find_likelihood_export
from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.likelihood.images import read_all
from latentvae.tasks.likelihood.task import LikelihoodTask

BATCH = 50


@dataclass(frozen=True)
class Pairs:
    """Compare the likelihoods of several data sets under a trained model."""

    model: Path
    """Folder that `latentvae train-vae` wrote, or the exported model in this folder."""

    normal: str
    """Normal images: images of the kind that the model learned from, but not its training
    images."""

    others: tuple[str, ...]
    """Data sets of images that the model should find anomalous. These images are resized to the
    size of the model's images."""

    out: Path
    """Folder for results.json."""

    background: Path | None = None
    """Model that was trained with --perturb_rate, for the likelihood ratio. Without this model, the
    likelihood ratio is not measured."""

    max_images: int = 1000
    """Largest number of images of each data set."""

    samples: int = 10
    """Number of latent samples for each image."""

    def run(self) -> None:
        """Score all images and print the table."""
        scores = {
            data: scores_of(
                self.model,
                self.background,
                open_items(data, pixels=PixelFormat(channels_of(self.model))),
                max_images=self.max_images,
                samples=self.samples,
            )[0]
            for data in (self.normal, *self.others)
        }

        # results
        rows = [
            {
                "other": other,
                "images": len(scores[other]["none"]),
                **aurocs(scores[self.normal], scores[other]),
            }
            for other in self.others
        ]
        means = {
            data: {name: float(values.mean()) for name, values in found.items()}
            for data, found in scores.items()
        }
        write(self.out, {"rows": rows, "mean_scores": means})
        for row in rows:
            print(shown(row, "other"))


@dataclass(frozen=True)
class Classes:
    """For each class, train a VAE without it, and detect images of this class as anomalies."""

    train: str
    """Training images with classes."""

    test: str
    """Test images of the same classes as the training images."""

    out: Path
    """Folder for the trainings and results.json."""

    preset: str = "vae_mnist"
    """Preset of `latentvae train-vae` with which all models are trained."""

    updates: int = 10000
    """Number of updates of each training."""

    left_out: tuple[int, ...] = tuple(range(10))
    """Indices of the classes to leave out. For each index, a VAE is trained without this class."""

    max_images: int = 1000
    """Largest number of test images."""

    samples: int = 10
    """Number of latent samples for each image."""

    perturb_rate: float = 0.2
    """Fraction (0 to 1) of the pixel values that become random in the training of background models
    (models whose likelihood is subtracted). With 0, no background models are trained."""

    seed: int = 0
    """Seed of the trainings."""

    def run(self) -> None:
        """Train all VAEs, score the test images, and print the table."""
        rows = []
        for label in self.left_out:
            model = self._trained(label, 0.0)
            background = self._trained(label, self.perturb_rate) if self.perturb_rate else None
            source, labels = labelled(self.test, channels_of(model))
            picked = some_of(source, self.max_images)
            found, kept = scores_of(
                model, background, picked, max_images=self.max_images, samples=self.samples
            )
            is_other = labels[np.array(picked.indices)[kept]] == label
            normal = {name: values[~is_other] for name, values in found.items()}
            other = {name: values[is_other] for name, values in found.items()}
            rows.append({"left_out": label, "images": int(is_other.sum()), **aurocs(normal, other)})
            print(shown(rows[-1], "left_out"), flush=True)
            write(self.out, {"rows": rows})
        names = [n for n in ("none", "complexity", "ratio") if n in rows[0]]
        print("mean " + ", ".join(f"{n} {np.mean([r[n] for r in rows]):.3f}" for n in names))

    def _trained(self, label: int, perturb_rate: float) -> Path:
        """Train a VAE without the images of one class. Return the folder of the run.

        A finished run is not repeated.
        """
        folder = self.out / f"without-{label}{'-perturbed' if perturb_rate else ''}"
        if find_likelihood_export(folder) is not None:
            return folder
        images = self.out / f"images-without-{label}"
        if not images.is_dir():
            write_others(self.train, images, label)
        config = load_preset(self.preset, LikelihoodConfig, max_train_steps=self.updates)
        run = {"output_dir": str(folder), "seed": self.seed, "log_steps": 1000}
        run |= {"checkpointing_steps": self.updates, "validation_steps": self.updates}
        data = {"train_data_dir": str(images), "perturb_rate": perturb_rate}
        train(LikelihoodTask(config.with_changes({"data": data, "run": run})))
        return folder


def channels_of(model: Path) -> int:
    """Return the number of image channels of a model."""
    return latentvae.load(str(find_likelihood_export(model) or model)).image_channels


def labelled(data: str, channels: int) -> tuple[ImageSource, np.ndarray]:
    """Return images and the indices of their classes."""
    source = open_items(data, pixels=PixelFormat(channels))
    found = find_labels(source, label_column=None)
    if found is None:
        raise UserError(f"'{data}' has no classes.")
    return source, np.array(found.values)


def write_others(data: str, folder: Path, label: int) -> None:
    """Write the images of all classes except `label` as greyscale PNG files."""
    source, labels = labelled(data, 1)
    unfinished = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    others = Subset(source, np.flatnonzero(labels != label).tolist())
    for index in tqdm(range(len(others)), desc=f"images without class {label}"):
        picture: Any = others.read(index)
        picture.save(unfinished / f"{index:06d}.png", compress_level=1)
    unfinished.rename(folder)


def scores_of(
    model: Path,
    background: Path | None,
    source: ImageSource,
    *,
    max_images: int,
    samples: int,
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Return anomaly scores (N,) in nats for each likelihood correction, and the images' indices.

    An index is a position in `some_of(source, max_images)`. Unreadable images are left out.
    """
    network = latentvae.load(str(find_likelihood_export(model) or model))
    side = network.fixed_size or network.f
    pixels, kept = read_all(some_of(source, max_images), EvalTransform(side), bad=BadImages())
    choices: dict[str, Any] = {"none": {}, "complexity": {"correction": "complexity"}}
    if background is not None:
        choices["ratio"] = {"correction": "ratio", "background": str(background)}
    found = {}
    for name, options in choices.items():
        method = Likelihood(ImageOptions(samples=samples, **options))
        parts = [method.score(network, batch).scores for batch in batches(pixels)]
        found[name] = torch.cat(parts).numpy()
    return found, kept


def batches(pixels: Tensor) -> Sequence[Tensor]:
    """Return images in [-1, 1] in batches."""
    return [part.float() / 127.5 - 1.0 for part in pixels.split(BATCH)]


def aurocs(normal: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the AUROC of each score. 1 means that all `other` images score above all `normal`."""
    truth = np.repeat([0, 1], [len(normal["none"]), len(other["none"])])
    return {
        name: float(roc_auc_score(truth, np.concatenate([normal[name], other[name]])))
        for name in normal
    }


def shown(row: dict[str, Any], key: str) -> str:
    """Return a row of the table as text."""
    values = [f"{n} {row[n]:.3f}" for n in ("none", "complexity", "ratio") if n in row]
    return f"{row[key]}: AUROC {', '.join(values)}"


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write the results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


COMMANDS: dict[str, Any] = {"pairs": Pairs, "classes": Classes}


def main(arguments: Sequence[str]) -> None:
    """Run the command (`pairs` or `classes`) that is given as first argument."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise UserError(f"the command must be one of {', '.join(COMMANDS)} (got '{name}').")
    parse_options(COMMANDS[name], arguments[1:], prog=f"image_anomaly.py {name}").run()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        exit_with(error)
