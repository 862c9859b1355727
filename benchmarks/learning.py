"""Compare how much `train/train_kl.py` and the plain script (reference.py) learn in equal time.

    python benchmarks/learning.py --data photos --validation_data unseen --out learning --minutes 45

The script prints a table and writes learning.json.

The two trainings are called arms. Both arms have the same network (`kl_small`), loss weights, batch
size, peak learning rate and schedule. First, the script measures the speeds of both arms in turns,
on an idle machine. From the speed of an arm it computes how many updates fit into the given time.
So the machine may do other work during the trainings. Finally, the networks are measured on unseen
images at twice the training resolution.

If you run the same command again, it keeps the existing speeds and networks and trains only the
missing networks. So several commands can train different arms and seeds at the same time (`--arms`,
`--seeds`).
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from reference import KL_SCALE, PERCEPTUAL_SCALE, Trained, train_reference
from rich.console import Console
from rich.table import Table

from latentvae.autoencoder import Autoencoder, load
from latentvae.cli.flags import exit_with, parse_options
from latentvae.data import ImageSource, open_source
from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.evaluation import METRICS_ONLY, evaluate
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import build_autoencoder_kl
from latentvae.tasks.autoencoder import load_preset, train
from latentvae.tasks.autoencoder.config import parse

PRESET = load_preset("kl_small")
BATCH = PRESET.run.train_batch_size
Arm = Literal["latentvae", "reference"]
RATE, WARMUP = PRESET.optimizer.learning_rate, PRESET.optimizer.lr_warmup_steps
UNTIMED = 10  # number of first updates, which are not timed. train_kl.py logs a row after them.


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
    """Minutes of training for each arm and seed."""

    seeds: tuple[int, ...] = (0, 1)
    """Seeds. Each arm is trained once for each seed."""

    threads: int = 2
    """Number of CPU threads in the measurement of speed, and by default also in the trainings."""

    mixed_precision: str = "bf16"
    """Precision of train_kl.py. The plain script uses float32, as such scripts do on a CPU."""

    speed_updates: int = 30
    """Number of updates in each measurement of speed. The first 10 updates are not timed. Each arm
    is measured twice, and the measurements of both arms alternate."""

    arms: tuple[Arm, ...] = ("latentvae", "reference")
    """Arms that this command trains. The networks of a seed are measured when all of them exist."""

    run_threads: int | None = None
    """Number of CPU threads in the trainings. Default: the value of threads."""


class Arms:
    """Trains and times the two arms (see the module) with the same images and options."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.source: ImageSource = open_source(options.data, split="train")
        self.perceptual = PerceptualLoss(load_lpips("vgg"))

    def speed(self, arm: Arm) -> float:
        """Return the mean seconds per update of an arm, without its first updates."""
        n, threads = self.options.speed_updates, self.options.threads
        if arm == "reference":
            return mean(self._reference(n, seed=0, threads=threads).seconds[UNTIMED:])
        out = self.options.out / "speed"
        self._train(n, seed=0, out=out, overwrite=True, threads=threads)
        rows = [row for row in read_rows(out / "log.jsonl") if "time/images_per_second" in row]
        speeds = [row["time/images_per_second"] for row in rows if row["update"] > UNTIMED]
        return mean(BATCH / speed for speed in speeds)

    def finish(self, arm: Arm, updates: int, *, seed: int) -> None:
        """Train the network of an arm, unless an earlier command has trained it.

        An unfinished run of the arm "latentvae" is resumed.
        """
        out, threads = self.options.out / f"seed{seed}", self.options.run_threads
        threads = threads or self.options.threads
        if arm == "latentvae":
            self._train(updates, seed=seed, out=out / arm, overwrite=False, threads=threads)
        elif not (out / "reference, averaged").exists():
            trained = self._reference(updates, seed=seed, threads=threads)
            trained.raw.save_pretrained(out / "reference")
            trained.averaged.save_pretrained(out / "reference, averaged")

    def networks(self, seed: int) -> dict[str, Autoencoder]:
        """Return the networks of a seed by name, or an empty dict if a network is missing."""
        out = self.options.out / f"seed{seed}"
        paths = {
            "latentvae": out / "latentvae/export",
            "reference": out / "reference",
            "reference, averaged": out / "reference, averaged",
        }
        if not all(path.exists() for path in paths.values()):
            return {}
        return {name: load(path) for name, path in paths.items()}

    def _train(self, updates: int, *, seed: int, out: Path, overwrite: bool, threads: int) -> None:
        """Train with `latentvae.tasks.autoencoder.train`, as train_kl.py does."""
        torch.set_num_threads(threads)

        # options that differ from the preset
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
            "discriminator": {"disc_scale": 0.0},
            "run": {
                "output_dir": str(out),
                "overwrite_output_dir": overwrite,
                "seed": seed,
                "max_train_steps": updates,
                "validation_steps": updates,
                "log_steps": UNTIMED,
                "mixed_precision": self.options.mixed_precision,
            },
        }

        preset = PRESET.model_dump()
        changed = {name: preset[name] | section for name, section in values.items()}
        train(parse(preset | changed, source="learning.py"))

    def _reference(self, updates: int, *, seed: int, threads: int) -> Trained:
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        shape: dict[str, Any] = PRESET.model.shape() | {
            "initial_posterior_logvar": 0.0
        }  # the initial value in diffusers
        return train_reference(
            build_autoencoder_kl(**shape),
            self.source,
            self.perceptual,
            resolution=PRESET.data.size[0],
            batch_size=BATCH,
            updates=updates,
            learning_rate=RATE,
            warmup=WARMUP,
            seed=seed,
        )


def measured(
    models: dict[str, Autoencoder], options: Options, *, out: Path
) -> dict[str, dict[str, float]]:
    """Return each model's mean PSNR, SSIM and LPIPS at twice the training resolution.

    The models reconstruct the images of `options.validation_data`.
    """
    report = evaluate(
        models,
        open_source(options.validation_data),
        out,
        data_name=options.validation_data,
        lpips={net: PerceptualLoss(load_lpips(net)) for net in ("alex", "vgg")},
        plan=replace(METRICS_ONLY, resolution=2 * PRESET.data.size[0]),
    ).to_dict()
    metrics = ("psnr", "ssim", "lpips_alex", "lpips_vgg")
    return {
        name: {metric: model["metrics"][metric]["mean"] for metric in metrics}
        for name, model in report["models"].items()
    }


def run(options: Options) -> None:
    """Measure both arms' speeds, train both arms, and measure the quality of their networks."""
    if options.speed_updates < 2 * UNTIMED:
        raise UserError(
            f"speed_updates must be at least {2 * UNTIMED}, because the first {UNTIMED} are not "
            f"timed (got {options.speed_updates})."
        )

    # speeds and networks
    arms = Arms(options)
    speeds = _speeds(arms, options)
    updates = {arm: int(60 * options.minutes / min(seconds)) for arm, seconds in speeds.items()}
    for seed in options.seeds:
        for arm in options.arms:
            arms.finish(arm, updates[arm], seed=seed)
            print(f"seed {seed}, {arm}: {updates[arm]:,} updates are done", flush=True)

    # metrics of each seed
    result: dict[str, Any] = {
        "minutes": options.minutes,
        "threads": options.threads,
        "torch": torch.__version__,
        "seconds_per_update": speeds,
        "updates": updates,
        "seeds": {},
    }
    for seed in options.seeds:
        if not (networks := arms.networks(seed)):
            print(f"seed {seed}: not measured yet, because not all of its networks are trained")
            continue
        result["seeds"][seed] = measured(
            networks, options, out=options.out / f"seed{seed}" / "report"
        )
        Console().print(_table(result, seed))
        (options.out / "learning.json").write_text(json.dumps(result, indent=1))


def _speeds(arms: Arms, options: Options) -> dict[Arm, list[float]]:
    """Return the seconds per update of both arms, measured twice in turns.

    If an earlier command has saved the speeds in a file, they are read from that file instead.
    Both arms run in one process. So the memory allocator settings of `train` also hold for the
    plain script.
    """
    path = options.out / "speed.json"
    if path.exists():
        return json.loads(path.read_text())
    speeds: dict[Arm, list[float]] = {"latentvae": [], "reference": []}
    for _ in range(2):
        for arm, seconds in speeds.items():
            seconds.append(arms.speed(arm))
    path.write_text(json.dumps(speeds))
    return speeds


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
