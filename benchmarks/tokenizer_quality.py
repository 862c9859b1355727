"""Compare tokenizers trained with this package's quantisers and with vector-quantize-pytorch's.

    python benchmarks/tokenizer_quality.py --data photos --validation_data unseen --json out.json

The script prints a table of metrics on unseen images and writes JSON. For each quantiser and seed,
there are two trainings, called arms. One arm trains the network of `vq_small` with our quantiser.
The other arm uses the quantiser of vector-quantize-pytorch ("theirs"). If you run the command
again, the script does not repeat finished trainings, so you can add quantisers and seeds later.

Both arms have the following in common:

- the initial weights of encoder and decoder, and the images and their order
- the objective (L2 and 0.1 LPIPS-alex, no discriminator) and the weights of all losses
- the optimiser, its schedule, and the straight-through gradient
- the decay of the moving averages that compute codes, and the features that k-means starts from
- the initial codes of SimVQ, which has no k-means

The arms differ in these points, because the two packages define them differently:

- A code counts as unused if the moving average of its use is too low. Our quantiser restarts codes
  below 6% of the mean use. The moving average of our quantiser covers about the number of updates
  in which a code with 6% of the mean use is chosen once. vector-quantize-pytorch restarts codes
  below 2% of the mean use, and the decay of its moving average is 0.8. If each update has as many
  vectors as there are codes, our quantiser needs 17 updates to restart a code that is never chosen.
  vector-quantize-pytorch needs 18 updates, if the moving average of this code starts at 1.
- In vector-quantize-pytorch, a learned codebook has one weight for both the commitment loss and the
  codebook loss. Our quantiser uses the weight of vector-quantize-pytorch for both of its losses.
- With cosine distance, the codes of vector-quantize-pytorch can only be moving averages. So with
  cosine distance, our codes are moving averages too.
- In the residual quantiser of vector-quantize-pytorch, each level passes the decoder's gradient to
  the features. Our residual quantiser passes the decoder's gradient to the features only once.
- In vector-quantize-pytorch, the moving average of a code's use starts at the number of vectors in
  the code's cluster of k-means. In our quantiser, this average starts at about 16% of the mean use.
  If codes are moving averages, our quantiser also averages the number of vectors of each code. This
  second average starts at the number of vectors in the cluster of k-means. The numbers are scaled
  so that their sum is the number of vectors in an update.

Each arm makes `--updates` updates, or as many as fit into `--minutes` at the speed of the arm. To
measure the speeds, updates of both arms alternate. All times are CPU times, so other work on the
machine hardly changes them.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
from quantizer_pairs import DEAD, KINDS, Kind, Name, Theirs
from rich.console import Console
from rich.table import Table
from torch import Tensor

from latentvae.cli.flags import exit_with, parse_options
from latentvae.data import EvalTransform, open_source
from latentvae.data.dataset import validation_batches
from latentvae.engine.schedule import learning_rate
from latentvae.engine.updates import clip_gradients
from latentvae.errors import UserError
from latentvae.losses.objective import Objective
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.metrics.image import psnr, to_8bit
from latentvae.metrics.tokens import TokenUsage
from latentvae.models import DiscreteAutoencoder
from latentvae.models.conv.vq import build_discrete
from latentvae.models.tokenizer_family import DiscreteTrainingWrapper
from latentvae.tasks.autoencoder import load_preset
from latentvae.tasks.autoencoder.backward import backward_model
from latentvae.tasks.autoencoder.codebook import CodebookUpdate
from latentvae.tasks.autoencoder.config import parse

PRESET = load_preset("vq_small")
START_VECTORS = 8  # number of vectors per code for k-means
WARM_UP = 2  # number of first updates, which are not timed
HIGHER_IS_BETTER = {"psnr": True, "lpips_alex": False, "usage": True, "perplexity": True}
Arm = Literal["ours", "theirs"]
ARMS: tuple[Arm, ...] = ("ours", "theirs")


@dataclass(frozen=True)
class Options:
    """What to train on, and for how long."""

    data: str
    """Folder of training images."""

    validation_data: str
    """Folder of unseen images."""

    json: Path
    """JSON file for the results. If the file already has the results of a network, this network is
    not trained again."""

    quantizers: tuple[Name, ...] = tuple(KINDS)
    """Quantisers of this package to compare with the same quantisers in vector-quantize-pytorch."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings. For each quantiser and seed there are two trainings: one with this
    package's quantiser, and one with that of vector-quantize-pytorch."""

    updates: int = 300
    """Number of updates of each training."""

    minutes: float | None = None
    """Time of each training in CPU minutes. If you give this option, `updates` has no effect."""

    resolution: int = 64
    """Side of the images in pixels."""

    batch_size: int = 16
    """Number of images per update."""

    channels: int = PRESET.model.shape()["block_out_channels"][0]
    """Number of channels of the network's first level. The ratios between the channels of all
    levels are those of the preset vq_small."""

    speed_updates: int = 10
    """Number of timed updates with each of the two quantisers, to measure their speed. Updates with
    this package's quantiser alternate with updates with the quantiser of
    vector-quantize-pytorch."""

    threads: int = 1
    """Number of CPU threads."""

    def settings(self) -> dict[str, Any]:
        """Return the options that must be equal for all trainings (arms) in one JSON file."""
        names = "data validation_data updates minutes resolution batch_size channels threads"
        return {name: getattr(self, name) for name in names.split()}


class Training:
    """Trains a network with our quantiser or with that of vector-quantize-pytorch (an arm)."""

    def __init__(
        self, name: Name, arm: Arm, *, seed: int, images: Tensor, options: Options, updates: int
    ) -> None:
        # network and codes
        kind = KINDS[name]
        vectors = options.batch_size * (options.resolution // PRESET.model.f) ** 2
        self.net = _network(kind, arm, seed=seed, vectors=vectors, channels=options.channels)
        self.wrapper = DiscreteTrainingWrapper(self.net).train()
        if "num_codes" in kind.ours:
            _initialise(self.net, images, seed=seed, batch_vectors=vectors)

        # images, objective and optimiser
        self.images, self.batch_size = images, options.batch_size
        self.order = _order(len(images), seed=seed)
        self.config = _schedule(updates)
        self.objective = Objective(
            rec_loss=PRESET.objective.rec_loss,
            perceptual=PerceptualLoss(load_lpips("alex")),
            perceptual_scale=PRESET.objective.perceptual_scale,
            kl_scale=None,
            latent_weights=kind.weights | {"theirs": 1.0},
        )
        self.optimizer = torch.optim.AdamW(self.net.parameters(), weight_decay=0.0, fused=True)
        self.codebook = CodebookUpdate((self.net.quantize,), seed=seed)
        self.done = 0

    def update(self) -> None:
        """Make one training update of the network."""
        peak = PRESET.optimizer.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, peak=peak, config=self.config)

        # gradients
        images = self.images[[next(self.order) for _ in range(self.batch_size)]]
        out = self.wrapper(images)
        backward_model(
            images,
            out,
            objective=self.objective,
            update=self.done,
            last_layer=self.wrapper.last_layer,
            adversary=None,
        )

        # steps of the network and of the codebook
        clip_gradients(self.net.parameters(), PRESET.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.codebook.add(out)
        self.codebook.apply(self.done, optimizer=self.optimizer, averages={})
        self.codebook.clear()
        self.done += 1


def _network(
    kind: Kind, arm: Arm, *, seed: int, vectors: int, channels: int
) -> DiscreteAutoencoder:
    """Return the preset's network with our quantiser, or with that of vector-quantize-pytorch.

    Args:
        vectors: number of vectors in an update.
        channels: number of channels of the first level.
    """
    widths = PRESET.model.shape()["block_out_channels"]
    shape: dict[str, Any] = PRESET.model.shape() | {
        "block_out_channels": [width * channels // widths[0] for width in widths],
        "quantizer": kind.ours,
    }
    torch.manual_seed(seed)
    net = build_discrete(**shape)
    if arm == "theirs":
        module = kind.theirs(DEAD * vectors / net.quantize.num_codes)
        kind.start_alike(net.quantize, module)
        net.quantize = Theirs(module, net.quantize)
    return net


@torch.no_grad()
def _initialise(net: DiscreteAutoencoder, images: Tensor, *, seed: int, batch_vectors: int) -> None:
    """Set the initial codes by k-means on features of the untrained encoder."""
    wanted, vectors = START_VECTORS * net.quantize.num_codes, []
    for part in images.split(16):
        vectors.append(net.encode(part).latents.movedim(1, -1).flatten(0, -2))
        if sum(map(len, vectors)) >= wanted:
            break
    generator = torch.Generator().manual_seed(seed)
    net.quantize.initialise(
        torch.cat(vectors)[:wanted], generator=generator, batch_vectors=batch_vectors
    )


def _order(count: int, *, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _schedule(updates: int) -> Any:
    """Return the preset's options for ``updates`` updates, at most a tenth of them warm-up."""
    preset = PRESET.model_dump()
    warmup = min(preset["optimizer"]["lr_warmup_steps"], updates // 10)
    preset["optimizer"]["lr_warmup_steps"] = warmup
    preset["run"]["max_train_steps"] = updates
    return parse(preset, source="tokenizer_quality.py")


@torch.no_grad()
def measured(net: DiscreteAutoencoder, images: Tensor) -> dict[str, float]:
    """Return mean PSNR and LPIPS on unseen images, and usage and perplexity of their tokens.

    Usage and perplexity are means over the levels of the quantiser.
    """
    net.eval()
    lpips = PerceptualLoss(load_lpips("alex"))
    usage = TokenUsage(net.quantize.num_codes, codebooks=net.quantize.num_levels)
    values: dict[str, list[Tensor]] = {"psnr": [], "lpips_alex": []}
    for part in images.split(16):
        found = net.quantize(net.encode(part).latents)
        recon = to_8bit(net.decode_parameters(found.z))
        values["psnr"].append(psnr(part, recon))
        values["lpips_alex"].append(lpips(part, recon))
        usage.update(found.indices)
    tokens = usage.result()
    return {name: torch.cat(parts).mean().item() for name, parts in values.items()} | {
        "usage": tokens["usage"],
        "perplexity": tokens["perplexity"],
    }


class Comparison:
    """Makes all trainings (arms), and stores their results in a JSON file."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.result: dict[str, Any] = {
            "settings": options.settings(),
            "torch": torch.__version__,
            "cpu_seconds_per_update": {},
            "runs": {},
        }
        if options.json.exists():
            self.result = json.loads(options.json.read_text())
            if self.result["settings"] != options.settings():
                raise UserError(
                    f"'{options.json}' has results of trainings with other settings "
                    f"({self.result['settings']}). Give another file to --json."
                )
        self.images = _loaded(options.data, "train", options.resolution)
        self.unseen = _loaded(options.validation_data, "validation", options.resolution)

    def run(self) -> None:
        """Measure all speeds and make all trainings that have no results in the JSON file yet."""
        for name in self.options.quantizers:
            self._measure_speed(name)
            for seed in self.options.seeds:
                for arm in ARMS:
                    self._finish(name, arm, seed=seed)

    def _measure_speed(self, name: Name) -> None:
        if name in self.result["cpu_seconds_per_update"]:
            return
        arms: dict[Arm, Training] = {
            arm: self._training(name, arm, seed=0, updates=1000) for arm in ARMS
        }
        seconds: dict[Arm, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(WARM_UP + self.options.speed_updates):
            for arm, training in arms.items():
                start = time.process_time()
                training.update()
                seconds[arm].append(time.process_time() - start)
        kept: dict[Arm, list[float]] = {arm: values[WARM_UP:] for arm, values in seconds.items()}
        self.result["cpu_seconds_per_update"][name] = kept
        self._save()
        print(f"{name}: " + ", ".join(f"{arm} {median(kept[arm]):.3f} s" for arm in ARMS))

    def _finish(self, name: Name, arm: Arm, *, seed: int) -> None:
        run = f"{name}/{seed}/{arm}"
        if run in self.result["runs"]:
            return
        updates = self.options.updates
        if self.options.minutes is not None:
            seconds = median(self.result["cpu_seconds_per_update"][name][arm])
            updates = max(int(60 * self.options.minutes / seconds), 1)
        training = self._training(name, arm, seed=seed, updates=updates)
        start = time.process_time()
        for _ in range(updates):
            training.update()
        seconds = time.process_time() - start
        found = measured(training.net, self.unseen)
        self.result["runs"][run] = found | {"updates": updates, "cpu_seconds": seconds}
        self._save()
        numbers = " ".join(f"{metric} {value:.4f}" for metric, value in found.items())
        print(f"{run}: {numbers} ({updates} updates, {seconds:.0f} s)", flush=True)

    def _training(self, name: Name, arm: Arm, *, seed: int, updates: int) -> Training:
        return Training(
            name, arm, seed=seed, images=self.images, options=self.options, updates=updates
        )

    def _save(self) -> None:
        self.result["rows"] = rows(self.result)
        part = self.options.json.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1))
        part.replace(self.options.json)


def _loaded(spec: str, split: str, resolution: int) -> Tensor:
    """Read all images of a source (such as a folder). Return centre crops (N, 3, R, R)."""
    source = open_source(spec, split=split)
    batches = validation_batches(source, EvalTransform(resolution), batch_size=16)
    return torch.cat([images for images, _ in batches])


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per quantiser and metric, with means over seeds for which both arms are done.

    The range of an arm (the trainings with one package) is its largest value minus its smallest
    value over the seeds. `spread` is the larger range of the two arms.
    """
    found: list[dict[str, Any]] = []
    for name in KINDS:
        seeds = [run.split("/")[1] for run in result["runs"] if run.startswith(f"{name}/")]
        seeds = [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) == len(ARMS)]

        for metric, higher in HIGHER_IS_BETTER.items() if seeds else ():
            values = {
                arm: [result["runs"][f"{name}/{seed}/{arm}"][metric] for seed in seeds]
                for arm in ARMS
            }

            spread = max(max(each) - min(each) for each in values.values())
            difference = mean(values["ours"]) - mean(values["theirs"])
            row = {"quantizer": name, "metric": metric, "seeds": len(seeds)}
            row |= {arm: mean(each) for arm, each in values.items()}
            row |= {"difference": difference, "spread": spread}
            worse = -difference if higher else difference
            found.append(row | {"worse_beyond_spread": len(seeds) > 1 and worse > spread})
    return found


def _table(result: dict[str, Any]) -> Table:
    table = Table(title="unseen images; difference = ours - theirs, spread = range over seeds")
    for column in ("quantiser", "metric", *ARMS, "difference", "spread", "ours is worse"):
        table.add_column(column)
    for row in result["rows"]:
        numbers = [f"{row[name]:.4g}" for name in (*ARMS, "difference", "spread")]
        worse = "beyond the spread" if row["worse_beyond_spread"] else ""
        table.add_row(row["quantizer"], row["metric"], *numbers, worse)
    for name, seconds in result["cpu_seconds_per_update"].items():
        own, theirs = (median(seconds[arm]) for arm in ARMS)
        table.add_row(name, "CPU s/update", f"{own:.3f}", f"{theirs:.3f}", f"{own - theirs:.3f}")
    return table


def main() -> None:
    try:
        options = parse_options(
            Options, sys.argv[1:], prog="tokenizer_quality.py", description=__doc__
        )
        torch.set_num_threads(options.threads)
        comparison = Comparison(options)
        comparison.run()
        Console().print(_table(comparison.result))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
