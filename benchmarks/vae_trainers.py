"""Compare our trainings with pythae's by the time until a given likelihood bound is reached.

    pip install --no-deps --target peers pythae==0.1.2
    PYTHONPATH=peers python benchmarks/vae_trainers.py --data mnist/test.parquet --out out

Both packages train the dense network of the IWAE paper (arXiv:1509.00519) on the same binary
images, from the same weights, with batches of the same size and the same constant learning rate.
After each epoch, the same function measures the bound of both packages on the same unseen images.
The clock counts CPU seconds of the process, and stops while the bound is measured. The trainings of
both packages alternate. Our package trains twice: in bfloat16 if the processor can multiply
bfloat16 (`--mixed_precision auto`), and in float32, as pythae does. Our time includes all other
work of our trainer: clipping, checks of gradients, log rows, sample pictures and the last
checkpoint.
"""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vae_peers import import_peer, peer

from latentvae.cli.flags import exit_with, parse_options
from latentvae.config.presets import load_preset
from latentvae.engine.loop import train
from latentvae.errors import UserError
from latentvae.evaluation.likelihood import bounds_of, total_of
from latentvae.models.dense.network import VectorVAE
from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.likelihood.task import LikelihoodTask

BATCH = 100
Curve = list[tuple[float, float]]
"""CPU seconds and negative likelihood bound (in nats) after each epoch."""


@dataclass(frozen=True)
class Options:
    """What to train, and for how long."""

    data: str
    """Images of digits, in any form that --train_data_dir of `latentvae train-vae` takes."""

    out: Path
    """Folder for this project's trainings and results.json. This folder must be new."""

    samples: tuple[int, ...] = (1, 50)
    """Numbers of latent samples for each image in training. 1 trains a VAE, and larger numbers
    train an IWAE."""

    bounds: tuple[float, ...] = (120.0, 115.0)
    """Values that the negative bound must reach, in nats per image: one value for each number in
    `samples`. The bound is the ELBO for the VAE, and the importance-weighted bound for the IWAE."""

    epochs: int = 15
    """Length of each training in epochs."""

    rounds: int = 3
    """Number of rounds. Each round has its own seed."""

    learning_rate: float = 1e-3
    """Learning rate of Adam."""

    def run(self) -> None:
        """Train in all rounds, print a line for each round, and write results.json."""
        if len(self.samples) != len(self.bounds):
            raise UserError(
                f"`bounds` must have as many values as `samples`: {len(self.samples)} "
                f"(got {len(self.bounds)})."
            )
        rows = []
        for samples, bound in zip(self.samples, self.bounds, strict=True):
            for seed in range(self.rounds):
                rows.append(self._round(samples, bound, seed))
                print(shown(rows[-1]), flush=True)
        options = {name: str(value) for name, value in asdict(self).items()}
        content = {"options": options, "rows": rows}
        (self.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")

    def _round(self, samples: int, bound: float, seed: int) -> dict[str, Any]:
        curves: dict[str, Curve] = {}
        for name, precision in (("ours", "auto"), ("ours, float32", "no")):
            task = self._trained(samples, seed, precision=precision)
            curves[name] = task.curve
        curves["pythae"] = self._pythae(samples, seed, task)
        reached = {name: seconds_to(curve, bound) for name, curve in curves.items()}
        return {
            "samples": samples,
            "seed": seed,
            "bound": bound,
            "seconds": reached,
            "last": {name: curve[-1] for name, curve in curves.items()},
            "curves": curves,
        }

    def _trained(self, samples: int, seed: int, *, precision: str) -> "TimedTask":
        """Train with our package, and return the task."""
        name = f"{samples}-{seed}-{precision}"
        config = load_preset("vae_mnist", LikelihoodConfig)
        optimizer = {
            "learning_rate": self.learning_rate,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "use_ema": False,
        }
        bound = "elbo" if samples == 1 else "iwae"
        run = {"output_dir": str(self.out / name), "train_batch_size": BATCH, "seed": seed}
        run["mixed_precision"] = precision
        config = config.with_changes(
            {
                "data": {"train_data_dir": self.data, "binarize": "static"},
                "objective": {"bound": bound, "train_samples": samples},
                "optimizer": optimizer,
                "run": run,
            }
        )

        # the length of an epoch is known only after the data are opened
        task = TimedTask(config, samples=samples)
        epoch = task.updates_per_epoch()
        steps = self.epochs * epoch
        lengths = {"max_train_steps": steps, "checkpointing_steps": steps}
        task = TimedTask(
            config.with_changes({"run": lengths | {"validation_steps": epoch}}), samples=samples
        )
        train(task)
        return task

    def _pythae(self, samples: int, seed: int, task: "TimedTask") -> Curve:
        """Train pythae's model on the images of our task, from the same initial weights."""
        before = dict(os.environ)
        pythae = import_peer()
        import pythae.data.datasets as datasets  # type: ignore[import-not-found]
        import pythae.trainers as trainers  # type: ignore[import-not-found]

        ours = VectorVAE()
        ours.load_state_dict(task.first)
        model = peer(pythae, ours, samples)
        assert task.pixels is not None
        images = (task.pixels / 255.0).float()
        curve, clock = Curve(), Clock()

        class Watch(trainers.training_callbacks.TrainingCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.start()

            def on_epoch_end(self, *_: Any, **__: Any) -> None:
                with clock.stopped():
                    curve.append((clock.seconds, measure(ours_of(trainer.model), task, samples)))

        config = trainers.BaseTrainerConfig(
            output_dir=str(self.out / f"pythae-{samples}-{seed}"),
            learning_rate=self.learning_rate,
            per_device_train_batch_size=BATCH,
            num_epochs=self.epochs,
            seed=seed,
            no_cuda=True,
        )
        trainer = trainers.BaseTrainer(
            model=model,
            train_dataset=datasets.BaseDataset(images, torch.zeros(len(images))),
            training_config=config,
            callbacks=[Watch()],
        )
        trainer.train()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]  # pythae sets these variables of distributed training
        return curve


class Clock:
    """Counts CPU seconds of this process, without the time inside `with clock.stopped()`."""

    def start(self) -> None:
        self.begin = time.process_time()

    @property
    def seconds(self) -> float:
        return time.process_time() - self.begin

    def stopped(self) -> "Clock":
        return self

    def __enter__(self) -> None:
        self.paused = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.begin += time.process_time() - self.paused


class TimedTask(LikelihoodTask):
    """Our training task, whose validation also adds (CPU seconds, negative bound) to a curve."""

    def __init__(self, config: LikelihoodConfig, *, samples: int) -> None:
        super().__init__(config)
        self.samples = samples
        self.curve, self.clock = Curve(), Clock()

    def updates_per_epoch(self) -> int:
        """Return the number of complete batches in one pass over the training images."""
        self.open()
        return len(self.train_images) // BATCH  # type: ignore[arg-type]

    def validate(self, update: int) -> dict[str, float]:
        if not update:
            self.first = {name: value.clone() for name, value in self.net.state_dict().items()}
            values = super().validate(update)
            self.clock.start()
            return values
        with self.clock.stopped():
            copy = VectorVAE()  # computes in float32
            copy.load_state_dict(self.net.state_dict())
            self.curve.append((self.clock.seconds, measure(copy, self, self.samples)))
            return super().validate(update)


@torch.no_grad()
def measure(net: VectorVAE, task: LikelihoodTask, samples: int) -> float:
    """Return the negative bound on the unseen images of a task, in nats per image."""
    net.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        count = len(task.validation_pixels)
        parts = [
            bounds_of(
                net, task.validation_batch(range(start, min(start + BATCH, count))), samples=samples
            )
            for start in range(0, count, BATCH)
        ]
    net.train()
    total = total_of(parts)
    return -(total.elbo if samples == 1 else total.importance) / total.images


def ours_of(model: Any) -> VectorVAE:
    """Return our network with the weights of pythae's network."""
    net = VectorVAE()
    encoder, decoder = model.encoder.state_dict(), model.decoder.state_dict()
    state: dict[str, Tensor] = {
        f"encoder.{name}": value for name, value in encoder.items() if name.startswith("layers.")
    }
    for part in ("weight", "bias"):
        state[f"moments.{part}"] = torch.cat([encoder[f"mean.{part}"], encoder[f"logvar.{part}"]])
        state[f"decoder.last.{part}"] = decoder.pop(f"layers.4.{part}")
    state |= {f"decoder.{name}": value for name, value in decoder.items()}
    net.load_state_dict(state)
    return net


def seconds_to(curve: Sequence[tuple[float, float]], bound: float) -> float | None:
    """Return the CPU seconds until the bound is reached, or None if it is never reached.

    The seconds are interpolated between two epochs. If the first epoch reaches the bound, the
    function returns the seconds of this epoch.
    """
    for (early, above), (late, nats) in pairwise([(0.0, math.inf), *curve]):
        if nats <= bound:
            if above == math.inf:
                return late
            return float(np.interp(bound, [nats, above], [late, early]))
    return None


def shown(row: dict[str, Any]) -> str:
    """Return the results of a round as a line of text."""
    parts = [
        f"{name} {'not reached' if value is None else f'{value:.1f} s'} (last epoch: "
        f"{row['last'][name][1]:.2f} nats after {row['last'][name][0]:.1f} s)"
        for name, value in row["seconds"].items()
    ]
    return (
        f"{row['samples']} samples, seed {row['seed']}, {row['bound']:g} nats: {'; '.join(parts)}"
    )


if __name__ == "__main__":
    try:
        parse_options(Options, sys.argv[1:], prog="vae_trainers.py").run()
    except UserError as error:
        exit_with(error)
