"""Compare how much training recipes learn in equal time, as curves of PSNR and LPIPS.

    python benchmarks/learning.py --recipes no_disc no_disc_random_adamw --data photos \\
        --validation_data unseen --minutes 15 --seeds 0 1 --json learning.json

A recipe is a preset, your own YAML file, a file in benchmarks/recipes, or `reference` (the plain
script, reference.py). If a YAML file has a line such as `preset: kl_small`, the file's values
replace those of this preset.

First, the script measures each recipe's start (the seconds before the first update) and its seconds
per update, before and after the start of the discriminator. The machine should be idle during this
phase. From these times, the script computes how many updates fit into the given time. The script
then trains every recipe with every seed, for this number of updates. The number of updates is
fixed, so other work on the machine does not shorten these trainings. The script measures the
weights at several points of each training, on unseen images. If the recipe uses EMA, the averaged
weights are measured.

The script writes the JSON file and, in the same folder, a plot (learning.png). If you run the same
command again, the script keeps finished measurements and trainings. The script continues
interrupted trainings, but an interrupted training of `reference` starts from the beginning.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from learning_pictures import plot, table
from learning_recipes import HERE, REFERENCE, Recipe, Speed, read_recipe
from rich.console import Console
from safetensors.torch import load_file
from timing import machine
from tqdm import tqdm

from latentvae.cli.flags import exit_with, parse_options
from latentvae.data import BadImages, EvalTransform
from latentvae.engine.checkpoint_files import PREFIX
from latentvae.engine.log import read_rows
from latentvae.engine.resume import CONFIG_NAME
from latentvae.errors import UserError
from latentvae.files import read_yaml
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import Network, build_autoencoder_kl
from latentvae.tasks.autoencoder import load_preset
from latentvae.tasks.autoencoder.images import open_data
from latentvae.tasks.autoencoder.run_export import checkpoint_network
from latentvae.tasks.autoencoder.validate import validate

UNTIMED = 10  # number of first updates, which are not timed


@dataclass(frozen=True)
class Options:
    """Options: which recipes (configs) to train, on which images, and for how long."""

    recipes: tuple[str, ...] = ("no_disc", REFERENCE)
    """Recipes (configs of trainings) to compare: names of presets, your own YAML files, names of
    files in benchmarks/recipes, or `reference` (the plain script reference.py)."""

    data: str = "samples"
    """Folder of training images."""

    validation_data: str | None = None
    """Folder of unseen images. By default, a part of the training images is held out."""

    minutes: float = 45.0
    """Training time in minutes for each recipe and seed. This time includes the seconds before the
    first update."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings. Each recipe is trained once with each seed."""

    json: Path = Path("learning.json")
    """JSON file for the results. The plot has the same name and ends with .png."""

    out: Path = Path("learning")
    """Folder of the trainings."""

    resolution: int | None = None
    """Side in pixels to which the unseen images are resized and cropped for the measurement.
    Default: twice the resolution of the training."""

    points: int = 6
    """Number of points on each learning curve, at equal distances in updates."""

    threads: int = 2
    """Number of CPU threads. All threads are used while the speed is measured. Trainings that run
    at the same time share the threads."""

    jobs: int = 1
    """Number of trainings that run at the same time. The CPU threads are divided among these
    trainings."""

    speed_updates: int = 40
    """Number of updates for the measurement of the speed. The first 10 updates are not timed."""


class Trainings:
    """Times and trains recipes in new processes. Each recipe has a folder in `options.out`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        validation = options.validation_data
        self.data = ["--train_data_dir", options.data]
        self.data += [] if validation is None else ["--validation_data_dir", validation]

    def speed(self, recipe: Recipe) -> Speed:
        """Return the speed of a recipe, measured now or by an earlier command."""
        path = self.options.out / recipe.name / "speed.json"
        measured_for = {
            "options": recipe.values,
            "threads": self.options.threads,
            "data": self.options.data,
            "updates": self.options.speed_updates,
        }
        if path.exists():
            saved = json.loads(path.read_text())
            if saved.pop("measured_for") == measured_for:
                return Speed(**saved)

        start, update = self._measured(recipe, learning=False)
        later = None
        if recipe.values is not None and recipe.config().discriminator.disc_scale > 0:
            _, later = self._measured(recipe, learning=True)
        speed = Speed(start, update, later)
        path.write_text(json.dumps(dataclasses.asdict(speed) | {"measured_for": measured_for}))
        return speed

    def _measured(self, recipe: Recipe, *, learning: bool) -> tuple[float, float]:
        """Return the seconds before the first update, and the median seconds per update.

        Args:
            learning: whether the discriminator learns.
        """
        out, n = self.options.out / recipe.name, self.options.speed_updates
        folder, rows = out / "speed", out / "speed" / "log.jsonl"
        command = self._command(recipe, folder, seed=0, updates=n)
        if recipe.values is not None:
            command += ["--overwrite_output_dir", "--disc_start", str(0 if learning else n)]

        # The log has a row after every `UNTIMED` updates.
        begin, seen = time.time(), None
        process = self._started(command, out / "speed.txt", threads=self.options.threads)
        while process.poll() is None:
            if seen is None and rows.exists() and rows.stat().st_mtime > begin:
                if any(row["update"] >= UNTIMED for row in read_rows(rows)):
                    seen = time.time()
            time.sleep(0.02)
        _check(process, out / "speed.txt")

        speeds = [row for row in read_rows(rows) if "time/images_per_second" in row]
        batch = speeds[0]["images"] / speeds[0]["update"]
        timed = [batch / r["time/images_per_second"] for r in speeds if r["update"] > UNTIMED]
        first = batch / speeds[0]["time/images_per_second"]
        assert seen is not None and speeds[0]["update"] == UNTIMED
        return max(seen - begin - UNTIMED * first, 0.0), median(timed)

    def train(self, recipe: Recipe, updates: int, *, seed: int) -> Path:
        """Train a recipe, and return the folder of the run. A finished run is not repeated."""
        folder = self.options.out / recipe.name / f"seed{seed}, {updates} updates"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if recipe.values is None and (folder / f"{updates}.safetensors").exists():
            return folder
        command = self._command(recipe, folder, seed=seed, updates=updates)
        log = folder.with_name(f"{folder.name}.txt")
        threads = max(1, self.options.threads // self.options.jobs)
        process = self._started(command, log, threads=threads)
        process.wait()
        _check(process, log)
        return folder

    def points(self, updates: int) -> list[int]:
        """Return the updates whose weights are measured, for a run of `updates` updates."""
        step = max(1, updates // self.options.points)
        return [*range(step, updates - step // 2, step), updates]

    def _command(self, recipe: Recipe, folder: Path, *, seed: int, updates: int) -> list[str]:
        step = str(max(1, updates // self.options.points))
        if recipe.values is None:
            own = {"out": folder, "seed": seed, "updates": updates, "save_every": step}
            return [sys.executable, str(HERE / "reference.py"), *_flags(own), *self.data]
        own = {
            "config": self._config_file(recipe),
            "output_dir": folder,
            "seed": seed,
            "max_train_steps": updates,
            "checkpointing_steps": step,
            "checkpoints_total_limit": 10 * self.options.points,
            "validation_steps": updates,
            "max_validation_images": 8,
            "log_steps": UNTIMED,
        }
        return [sys.executable, "-m", "latentvae.cli.train", *_flags(own), *self.data]

    def _config_file(self, recipe: Recipe) -> Path:
        """Write the options of a recipe to a file that `--config` reads."""
        path = self.options.out / recipe.name / "recipe.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe.values, sort_keys=False))
        return path

    def _started(self, command: list[str], log: Path, *, threads: int) -> Any:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            return subprocess.Popen(  # noqa: S603
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )


def _flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def _check(process: Any, log: Path) -> None:
    """Raise an error with the last line of a training's output if the training failed."""
    if process.returncode:
        lines = log.read_text().strip().splitlines() or [""]
        raise UserError(
            f"a training ended with exit code {process.returncode}. Its output is in '{log}' and "
            f"ends with: {lines[-1]}"
        )


class Measurements:
    """Measures networks on unseen images: PSNR, SSIM and LPIPS (alex, vgg) of reconstructions."""

    def __init__(self, options: Options, trainings: Trainings) -> None:
        self.options, self.trainings = options, trainings
        self.lpips = {net: PerceptualLoss(load_lpips(net)) for net in ("alex", "vgg")}

    def curve(
        self, recipe: Recipe, folder: Path, updates: int, *, seed: int
    ) -> list[dict[str, float]]:
        """Return the metrics of a run's weights at each update of `Trainings.points`.

        The file curve.json keeps the metrics, so that a later command does not measure them again.
        """
        path = folder / "curve.json"
        saved = json.loads(path.read_text()) if path.exists() else {}
        measured_on = [self.options.validation_data, self.options.resolution]
        if saved.get("measured_on") != measured_on:
            saved = {"measured_on": measured_on, "points": {}}
        for update in self.trainings.points(updates):
            if str(update) not in saved["points"]:
                net = self._network(recipe, folder, update)
                saved["points"][str(update)] = self._measured(recipe, net, seed=seed)
                path.write_text(json.dumps(saved))
        return [{"update": u, **saved["points"][str(u)]} for u in self.trainings.points(updates)]

    def _network(self, recipe: Recipe, folder: Path, update: int) -> Network:
        if recipe.values is None:
            net: Any = build_autoencoder_kl(**load_preset("kl_small").model.shape())
            net.load_state_dict(load_file(folder / f"{update}.safetensors"))
            return net.eval()
        return checkpoint_network(recipe.config(), folder / f"{PREFIX}{update}", base=None)

    def _measured(self, recipe: Recipe, net: Network, *, seed: int) -> dict[str, float]:
        config = recipe.config().with_changes(
            {
                "data": {
                    "train_data_dir": self.options.data,
                    "validation_data_dir": self.options.validation_data,
                },
                "run": {"seed": seed},  # the seed decides which images are held out
            }
        )
        _, images = open_data(config)

        # PSNR and SSIM, and LPIPS with each backbone
        side = self.options.resolution or 2 * config.data.size[0]
        measured: dict[str, float] = {}
        for backbone, perceptual in self.lpips.items():
            found = validate(
                net,
                images,
                transform=EvalTransform(side),
                perceptual=perceptual,
                batch_size=8,
                limit=len(images),
                device=torch.device("cpu"),
                bad=BadImages(),
            )
            found = {name.removeprefix("validation/"): value for name, value in found.items()}
            measured |= found | {f"lpips_{backbone}": found.pop("lpips")}
        return measured


def run(options: Options) -> None:
    """Measure all speeds, train all recipes, and measure all curves."""
    _check_options(options)
    recipes = [read_recipe(name) for name in options.recipes]
    trainings = Trainings(options)

    # speeds, one after another
    speeds = {recipe.name: trainings.speed(recipe) for recipe in recipes}
    updates = {r.name: speeds[r.name].updates_in(options.minutes, r) for r in recipes}
    for name, speed in speeds.items():
        later = speed.with_discriminator
        learning = "" if later is None else f" ({later:.3f} s with the discriminator)"
        print(
            f"{name}: starts in {speed.start:.1f} s, then {speed.update:.3f} s per update"
            f"{learning}, so {updates[name]:,} updates in {options.minutes:g} minutes",
            flush=True,
        )
        if updates[name] < options.points:
            raise UserError(
                f"minutes must be larger: in {options.minutes:g} minutes, {name} makes "
                f"{max(updates[name], 0)} updates, fewer than the {options.points} points."
            )

    # trainings
    todo = [(recipe, seed) for seed in options.seeds for recipe in recipes]

    def train(job: tuple[Recipe, int]) -> Path:
        return trainings.train(job[0], updates[job[0].name], seed=job[1])

    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(tqdm(pool.map(train, todo), "training", total=len(todo), unit="run"))

    # curves
    torch.set_num_threads(options.threads)
    measurements, runs = Measurements(options, trainings), []
    for (recipe, seed), folder in zip(todo, folders, strict=True):
        speed = speeds[recipe.name]
        curve = measurements.curve(recipe, folder, updates[recipe.name], seed=seed)
        for point in curve:
            done, total = int(point["update"]), updates[recipe.name]
            point["minutes"] = speed.minutes_of(done, recipe, total=total)
        runs.append(
            {
                "recipe": recipe.name,
                "seed": seed,
                "mixed_precision": _precision(folder),
                "curve": curve,
            }
        )
        _write(options, recipes, speeds, runs)
    Console(width=110).print(table(runs))


def _precision(folder: Path) -> str:
    """Return the precision that a training used. The script reference.py uses float32."""
    path = folder / CONFIG_NAME
    return (read_yaml(path)["run"]["mixed_precision"] or "no") if path.exists() else "no"


def _check_options(options: Options) -> None:
    for name, least in (("speed_updates", 2 * UNTIMED), ("points", 1), ("jobs", 1)):
        if (given := getattr(options, name)) < least:
            raise UserError(f"{name} must be at least {least} (got {given}).")
    stems = [Path(name).stem for name in options.recipes]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(f"two recipes are called '{twice[0]}'. Rename one of the files.")


def _write(
    options: Options, recipes: Sequence[Recipe], speeds: dict[str, Speed], runs: Sequence[Any]
) -> None:
    """Write the JSON file and the plot."""
    result = {
        "machine": machine(),
        "minutes": options.minutes,
        "data": options.data,
        "validation_data": options.validation_data,
        "recipes": {
            recipe.name: {
                "seconds_before_first_update": speeds[recipe.name].start,
                "seconds_per_update": speeds[recipe.name].update,
                "seconds_with_discriminator": speeds[recipe.name].with_discriminator,
                "options": recipe.values,
            }
            for recipe in recipes
        },
        "runs": list(runs),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(runs, options.json.with_suffix(".png"))


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="learning.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
