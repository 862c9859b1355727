"""Which learns more in the same time: `train/train_kl.py`, or the plain way to write it
(reference.py)?

    python benchmarks/learning.py --data photos --validation_data unseen --out learning --minutes 45

The same network (`kl_small`), loss weights, batch, peak learning rate and schedule. Each arm's
speed is measured first, in turns; each then makes as many updates as fit into the time, and is
measured on unseen images at twice the training resolution. Prints a table and writes learning.json.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from reference import KL_SCALE, PERCEPTUAL_SCALE, train_reference
from rich.console import Console
from rich.table import Table

from latentvae.autoencoder import Autoencoder, load
from latentvae.data import ImageSource, open_source
from latentvae.errors import UserError
from latentvae.flags import exit_with, parse_options
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import build_autoencoder_kl
from latentvae.report import measure
from latentvae.training import load_preset, train
from latentvae.training.log import read_rows
from latentvae.training.presets import parse

PRESET = load_preset("kl_small")
BATCH = PRESET.run.train_batch_size
RATE, WARMUP = PRESET.optimizer.learning_rate, PRESET.optimizer.lr_warmup_steps


@dataclass(frozen=True)
class Options:
    """What to train on, and for how long."""

    data: str
    """Folder of training images."""

    validation_data: str
    """Folder of unseen images."""

    out: Path
    """Folder for the runs and learning.json."""

    minutes: float = 45.0
    """Time for the updates of each arm and seed."""

    seeds: tuple[int, ...] = (0, 1)
    """One pair of runs for each."""

    threads: int = 2
    """CPU threads of each run."""

    mixed_precision: str = "bf16"
    """Precision of train_kl.py; the reference is float32, as the scripts are on a CPU."""

    speed_updates: int = 30
    """Updates in each measurement of the speed; two for each arm, in turns."""


class Arms:
    """The two ways to train, on the same images with the same options."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.source: ImageSource = open_source(options.data, split="train")
        self.perceptual = PerceptualLoss(load_lpips("vgg"))

    def ours(self, updates: int, *, seed: int, out: Path) -> tuple[float, dict[str, Autoencoder]]:
        """Seconds per update and the export's network."""
        torch.set_num_threads(self.options.threads)
        values: dict[str, dict[str, Any]] = {
            "data": {
                "train_data_dir": self.options.data,
                "validation_data_dir": self.options.validation_data,
                "max_validation_images": 8,
            },
            "objective": {
                "rec_loss": "l2",
                "lpips_net": "vgg",
                "perceptual_scale": PERCEPTUAL_SCALE,
                "kl_scale": KL_SCALE,
            },
            "critic": {"disc_scale": 0.0},
            "run": {
                "output_dir": str(out),
                "overwrite_output_dir": True,
                "seed": seed,
                "max_train_steps": updates,
                "validation_steps": updates,
                "log_steps": 10,
                "mixed_precision": self.options.mixed_precision,
            },
        }
        preset = PRESET.model_dump()
        changed = {name: preset[name] | section for name, section in values.items()}
        export = train(parse(preset | changed, source="learning.py"))
        rows = [row for row in read_rows(out / "log.jsonl") if "time/images_per_second" in row]
        speed = median(row["time/images_per_second"] for row in rows[1:])
        return BATCH / speed, {"latentvae": load(export)}

    def reference(self, updates: int, *, seed: int) -> tuple[float, dict[str, Autoencoder]]:
        """Seconds per update and the network with raw and with averaged weights."""
        torch.set_num_threads(self.options.threads)
        torch.manual_seed(seed)
        shape: dict[str, Any] = PRESET.model.model_dump() | {
            "initial_posterior_logvar": 0.0
        }  # as diffusers starts
        trained = train_reference(
            build_autoencoder_kl(**shape),
            self.source,
            self.perceptual,
            resolution=PRESET.data.resolution,
            batch_size=BATCH,
            updates=updates,
            learning_rate=RATE,
            warmup=WARMUP,
            seed=seed,
        )
        nets = {"reference": trained.raw, "reference, averaged": trained.averaged}
        return trained.seconds / updates, {k: Autoencoder(net, name=k) for k, net in nets.items()}


def measured(models: dict[str, Autoencoder], options: Options) -> dict[str, dict[str, float]]:
    """PSNR, SSIM and LPIPS of each, means over the unseen images at twice the resolution."""
    source = open_source(options.validation_data)
    lpips = {net: PerceptualLoss(load_lpips(net)) for net in ("alex", "vgg")}
    report = measure(
        models,
        ((source.name(i), source.read(i)) for i in range(len(source))),
        lpips=lpips,
        codecs={},
        resolution=2 * PRESET.data.resolution,
    ).to_dict()
    metrics = ("psnr", "ssim", "lpips_alex", "lpips_vgg")
    return {
        name: {metric: model["metrics"][metric]["mean"] for metric in metrics}
        for name, model in report["models"].items()
    }


def run(options: Options) -> None:
    arms, n = Arms(options), options.speed_updates
    speeds: dict[str, list[float]] = {"latentvae": [], "reference": []}
    for _ in range(2):
        speeds["latentvae"].append(arms.ours(n, seed=0, out=options.out / "speed")[0])
        speeds["reference"].append(arms.reference(n, seed=0)[0])
    updates = {arm: int(60 * options.minutes / min(seconds)) for arm, seconds in speeds.items()}
    result: dict[str, Any] = {
        "minutes": options.minutes,
        "threads": options.threads,
        "torch": torch.__version__,
        "seconds_per_update": speeds,
        "updates": updates,
        "seeds": {},
    }
    for seed in options.seeds:
        started = time.perf_counter()
        models = arms.ours(updates["latentvae"], seed=seed, out=options.out / f"seed{seed}")[1]
        models |= arms.reference(updates["reference"], seed=seed)[1]
        result["seeds"][seed] = measured(models, options)
        (options.out / "learning.json").write_text(json.dumps(result, indent=1))
        Console().print(_table(result, seed))
        print(f"seed {seed}: {(time.perf_counter() - started) / 60:.0f} minutes in all")


def _table(result: dict[str, Any], seed: int) -> Table:
    table = Table(
        title=(f"seed {seed}, {result['minutes']:g} minutes on {result['threads']} threads")
    )
    for column in ("arm", "updates", "PSNR (dB)", "SSIM", "LPIPS alex", "LPIPS vgg"):
        table.add_column(column)
    for name, values in result["seeds"][seed].items():
        updates = result["updates"][name.split(",")[0]]
        numbers = [f"{values['psnr']:.2f}", *(f"{v:.3f}" for k, v in values.items() if k != "psnr")]
        table.add_row(name, str(updates), *numbers)
    return table


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="learning.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
