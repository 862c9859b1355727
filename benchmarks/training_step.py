"""Compare the time of a training update in this project and in well-known scripts.

    python benchmarks/training_step.py --resolution 64 128 256 --json training_step.json

The network is an AutoencoderKL. The losses are L1, LPIPS on VGG16, KL, and a PatchGAN with adaptive
weight. The images are the sample photos (`samples`). reference_step.py reimplements the well-known
scripts. These reimplementations, called references, compute the same losses and gradients as this
project.

First, the losses and gradients of this project and of each reference are compared, to show that
they are equal. This project and the references start with equal weights and equal posterior noise,
and compute the discriminator's gradients from the same reconstruction. For this comparison, the
references have this project's layers. A second comparison shows how much these layers differ from
those of torch and diffusers (`layers_difference`). `equal_within` is the largest relative
difference of all losses, of all gradients, and of the second comparison. The relative difference of
gradients is the norm of (our gradient - reference's gradient), divided by the norm of the
reference's gradient. The difference of the adversarial loss is absolute, because this loss is a
mean of logits near 0.

Then this project and a reference make updates alternately, each in its own process, as in real
training. This project's updates are the functions that `train` calls, with all logging and with the
memory settings of `train`. In rows named bf16, this project uses bf16 autocast and the references
use float32, because the scripts do not use bf16 correctly. In rows named `bf16 both`, the
references use bf16 autocast too.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import patch_environment
from reference_step import SCRIPTS, ReferenceStep, TamingStep, Weights, gradient, relative
from timing import Row, alternate, collected, finish, own_process, row
from torch import Tensor

from latentvae.cli.flags import exit_with, parse_options
from latentvae.compute.memory import keep_freed_memory
from latentvae.data import Batch, EvalTransform, open_source
from latentvae.engine.processes import start_accelerator
from latentvae.engine.randomness import Stream, seed_everything
from latentvae.engine.training import build_training
from latentvae.engine.updates import UpdateResult, Updates
from latentvae.errors import UserError
from latentvae.tasks.autoencoder.backward import backward_discriminator
from latentvae.tasks.autoencoder.config import parse
from latentvae.tasks.autoencoder.task import AutoencoderTask

# Batch size by resolution, small enough for the memory of a laptop.
BATCH_SIZES = {64: 8, 128: 4, 256: 2}
WEIGHTS = Weights(lpips=0.5, kl=1e-6, adversarial=0.5)
Precision = Literal["fp32", "bf16"]
OURS, BOTH, PEER = "ours", ", bf16 both", "taming's own loss"


@dataclass(frozen=True)
class Options:
    """What to measure, and where to write the results."""

    json: Path | None = None
    """JSON file to write the results to."""

    resolution: tuple[int, ...] = (64, 128, 256)
    """Sides of the images in pixels."""

    batch_size: int | None = None
    """Number of images per update. Default: 8 at 64 px, 4 at 128 px and 2 at 256 px."""

    channels: tuple[int, ...] = (64, 128, 256, 256)
    """Number of channels of each level of the autoencoder."""

    disc_channels: int = 64
    """Number of channels of the discriminator's first layer."""

    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """Precisions in which this project's update is measured. bf16 means bfloat16 autocast."""

    runs: int = 5
    """Number of timed updates of this project and of each script that it is compared with, after
    three untimed updates. Updates of this project and of the script alternate."""

    threads: int | None = None
    """Number of CPU threads. Default: all cores."""

    device: str = "cpu"
    """Device to run on: cpu or cuda."""

    bf16_references: bool = False
    """Also measure, in bf16 autocast, the scripts that this project is compared with. The results
    are additional rows."""

    peer_script: Path | None = None
    """Folder of a clone of the repository CompVis/taming-transformers. If you give this folder, an
    update with the loss module of that repository is also measured."""

    quick: bool = False
    """Make a short measurement at 64 px only, with half the channels and three runs."""


class OurStep:
    """Makes this project's updates as in a real run, but always on the same batch.

    Args:
        options: the options of the benchmark.
        images: the batch of every update, (B, 3, R, R).
        precision: precision of autocast.
    """

    def __init__(self, options: Options, images: Tensor, precision: Precision) -> None:
        on_cpu = {"ACCELERATE_USE_CPU": "true"} if options.device == "cpu" else {}
        # Without this variable, Accelerate uses a GPU if there is one.
        with tempfile.TemporaryDirectory() as folder, patch_environment(**on_cpu):
            config = parse(_config(options, images, precision, folder), source="training_step.py")
            self.task = AutoencoderTask(config)
            self.task.open()
            accelerator = start_accelerator(config.run, Path(folder))
            training = build_training(self.task, folder=Path(folder), accelerator=accelerator)
        self.updates = Updates(training)
        self.batch = Batch(images=images, indices=torch.arange(len(images)), bad=[])

    def update(self) -> UpdateResult:
        """Make one update of the model and the discriminator."""
        return self.updates.make(iter([self.batch]))

    def backward(self) -> dict[str, Tensor]:
        """Add the loss gradients to the `grad` of the model, and return the logged losses."""
        return self.updates.micro_step(self.batch)

    def backward_discriminator(self, recon: Tensor) -> Tensor:
        """Add the loss gradient to the discriminator's `grad`, and return the loss."""
        adversary = self.task.adversary(0)
        assert adversary is not None
        return backward_discriminator(self.batch.images, recon, adversary=adversary)[
            "discriminator/loss"
        ]

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for learner in self.task.learners.values():
            learner.module.zero_grad()


def _config(
    options: Options, images: Tensor, precision: Precision, folder: str
) -> dict[str, dict[str, Any]]:
    objective = {
        "rec_loss": "l1",
        "lpips_net": "vgg",
        "perceptual_scale": WEIGHTS.lpips,
        "kl_scale": WEIGHTS.kl,
    }
    discriminator = {
        "disc_start": 0,
        "disc_ramp_steps": 0,
        "disc_warmup_steps": 0,
        "disc_scale": WEIGHTS.adversarial,
        "disc_channels": options.disc_channels,
    }

    return {
        "model": {"block_out_channels": options.channels, "norm_num_groups": 32},
        "data": {"train_data_dir": "samples", "resolution": images.shape[-1]},
        "objective": objective,
        "discriminator": discriminator,
        "optimizer": {"lr_warmup_steps": 0, "lr_scheduler": "constant", "learning_rate": 4.5e-6},
        "run": {
            "output_dir": folder,
            "train_batch_size": len(images),
            "mixed_precision": {"fp32": "no", "bf16": "bf16"}[precision],
        },
    }


def photos(resolution: int, count: int) -> Tensor:
    """Return sample photos (count, 3, resolution, resolution) in [-1, 1]."""
    source, transform = open_source("samples"), EvalTransform((resolution, resolution))
    indices = itertools.islice(itertools.cycle(range(len(source))), count)
    return torch.stack([transform(source.read(i)) for i in indices])


def difference(ours: OurStep, reference: ReferenceStep, images: Tensor) -> float:
    """Return the largest relative difference of our losses and gradients from a reference's.

    This project's networks and the reference's networks must have the same weights.
    """
    # losses of the model, with equal noise
    seed_everything(Stream.MICRO_STEP, ours.task.config.run.seed, 0, 0)
    logged = ours.backward()
    seed_everything(Stream.MICRO_STEP, ours.task.config.run.seed, 0, 0)
    losses = reference.backward_model(images)
    scale = reference.scale(images)
    pairs = [
        (logged["loss/nll"], losses["nll"]),
        (logged["loss/rec"], losses["rec"]),
        (logged["loss/lpips"], losses["lpips"]),
        (logged["loss/kl"], losses["kl"]),
        (logged["discriminator/adaptive_weight"], losses["adaptive_weight"]),
    ]
    net_gradients = gradient(ours.task.net), gradient(reference.net, scale=scale)
    ours.zero_grad()
    reference.discriminator.zero_grad()

    # loss of the discriminator, at one reconstruction
    with torch.no_grad():
        recon = reference.net(images).sample
    own, other = (
        ours.backward_discriminator(recon),
        reference.backward_discriminator(images, recon)["discriminator"],
    )
    pairs.append((own, other))
    assert ours.task.discriminator is not None
    discriminator_gradients = gradient(ours.task.discriminator), gradient(reference.discriminator)
    ours.zero_grad()
    for module in (reference.net, reference.discriminator):
        module.zero_grad()

    return max(
        relative(*net_gradients),
        relative(*discriminator_gradients),
        abs(logged["discriminator/adversarial"].item() - losses["adversarial"]),
        *(abs(a.item() / b - 1) for a, b in pairs),
    )


def measure(options: Options, resolution: int) -> Iterator[Row]:
    """Yield the rows of one resolution: a row for each precision and each script."""
    size = options.batch_size or BATCH_SIZES.get(resolution, 4)
    for precision in options.precision:
        print(f"{precision}, {resolution} px: comparing losses and gradients", flush=True)
        equal = _equality(options, resolution, precision)
        with own_process(build_side, OURS, options, resolution, precision) as ours:
            for name, within in equal.items():
                with own_process(build_side, name, options, resolution, precision) as theirs:
                    calls = {OURS: ours, name: theirs}
                    seconds = alternate(
                        calls, runs=options.runs, warmup=3, clock=lambda call: call()
                    )
                title = f"{precision}, {resolution} px, batch {size}, {name}"
                yield row(title, "s", seconds[OURS], seconds[name], equal_within=within)


def build_side(
    name: str, options: Options, resolution: int, precision: Precision
) -> Callable[[], object]:
    """Return a function that makes one update, either this project's or a reference's.

    `own_process` calls `build_side` in a new process for each name.
    """
    _set_threads(options)
    images = _images(options, resolution)
    ours = OurStep(options, images, precision)
    if name != OURS:
        reference = _reference(name, ours, options)
        return lambda: reference.update(images)
    keep_freed_memory(images.device)
    return ours.update


def _equality(options: Options, resolution: int, precision: Precision) -> dict[str, float]:
    """Return for each reference the largest relative difference from this project's update."""
    images = _images(options, resolution)
    ours = OurStep(options, images, precision)
    names = list(SCRIPTS)
    if options.bf16_references and precision == "bf16":
        names += [name + BOTH for name in SCRIPTS]
    if options.peer_script is not None:
        names.append(PEER)
    of_layers = layers_difference(ours, images)
    return {
        name: max(of_layers, difference(ours, _reference(name, ours, options, stock=False), images))
        for name in names
    }


def layers_difference(ours: OurStep, images: Tensor) -> float:
    """Return the largest relative difference between our layers and layers of torch and diffusers.

    Three results are compared: the reconstruction, the gradient of a linear function of the
    reconstruction, and LPIPS for one pair of batches. The gradient of the update is not compared,
    because float32 rounding alone changes the direction of the LPIPS gradient by 1e-3.
    """
    stock = _reference("diffusers mended", ours, Options())
    mix = torch.linspace(-1, 1, images.numel(), device=images.device).view_as(images)
    found = []
    for net, lpips in ((ours.task.net, ours.task.metric.lpips), (stock.net, stock.lpips)):
        recon = net(images).sample
        net.zero_grad()
        (recon * mix).sum().backward()
        with torch.no_grad():
            distances = lpips(images, 0.5 * images).flatten()
        found.append((recon.detach().flatten(), gradient(net), distances))
        net.zero_grad()
    return max(relative(*pair) for pair in zip(*found, strict=True))


def _reference(name: str, ours: OurStep, options: Options, *, stock: bool = True) -> ReferenceStep:
    """Return a reference with our weights.

    With `stock`, the reference has the layers of torch and diffusers. Otherwise, the reference
    keeps this project's layers.
    """
    task = ours.task
    assert task.discriminator is not None
    parts: Any = (task.net, task.discriminator, task.metric.lpips)
    if name == PEER:
        assert options.peer_script is not None
        return TamingStep(options.peer_script, *parts, weights=WEIGHTS, stock=stock)
    script = SCRIPTS[name.removesuffix(BOTH)]
    return ReferenceStep(script, *parts, weights=WEIGHTS, autocast=name.endswith(BOTH), stock=stock)


def _images(options: Options, resolution: int) -> Tensor:
    count = options.batch_size or BATCH_SIZES.get(resolution, 4)
    return photos(resolution, count).to(options.device)


def _set_threads(options: Options) -> None:
    torch.set_num_threads(options.threads or torch.get_num_threads())


def run(options: Options) -> None:
    """Measure all resolutions, and print the table of results."""
    _set_threads(options)
    if options.quick:
        short: dict[str, Any] = {"resolution": (64,), "channels": (32, 64, 128, 128), "runs": 3}
        options = Options(**vars(options) | short)
    rows = (row for resolution in options.resolution for row in measure(options, resolution))
    title = "one generator and discriminator update"
    finish(collected(rows), title=title, json_file=options.json)


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="training_step.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
