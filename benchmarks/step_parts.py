"""Compare the speed of each part of a training update with the machine's peak speed.

    python benchmarks/step_parts.py --resolution 64 --precision fp32 bf16

Each part of an update is timed alone. `torch.utils.flop_counter` counts the floating-point
operations of the part's convolutions, matrix products and attention. `flop_counter` does not count
the operations of normalisation and activation layers. The machine's peak speed is the higher speed
of two operations in the same precision: a product of 4096 x 4096 matrices, and a 3 x 3 convolution
of 256 channels. A part whose speed is near the peak can become faster only if it needs fewer
operations.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import timed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training_step import BATCH_SIZES, OurStep, Precision, photos
from training_step import Options as StepOptions

from latentvae.cli.flags import exit_with, parse_options
from latentvae.compute.memory import keep_freed_memory
from latentvae.engine.updates import clip_gradients
from latentvae.errors import UserError
from latentvae.tasks.autoencoder.backward import backward_discriminator


@dataclass(frozen=True)
class Options:
    """Options: sizes and precisions to measure, and number of timed runs."""

    resolution: tuple[int, ...] = (64,)
    """Sides of the images in pixels."""

    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """Precisions to measure. bf16 means bfloat16 autocast."""

    runs: int = 3
    """Number of timed runs of each part of an update. One untimed run, in which the operations are
    counted, comes before them."""

    threads: int | None = None
    """Number of CPU threads. Default: all cores."""


@dataclass(frozen=True)
class Part:
    """A part of an update: name, median seconds, and number of floating-point operations."""

    name: str
    seconds: float
    flops: float


class Parts:
    """Measures the parts of an update. Each part runs alone, on the results of earlier parts."""

    def __init__(self, images: Tensor, precision: Precision, runs: int) -> None:
        self.images, self.precision, self.runs = images, precision, runs
        self.step = OurStep(StepOptions(), images, precision)
        self.parts: list[Part] = []

    def measure(self) -> list[Part]:
        """Time every part, and return the parts in the order of the update."""
        task, images = self.step.task, self.images
        net, perceptual = task.net, task.metric

        # forward
        moments = self._timed("encoder", lambda: net.encode(images).latent_dist.parameters)
        z = moments.chunk(2, dim=1)[0].detach().float().requires_grad_()
        recon = self._timed("decoder", lambda: net.decode(z).sample)

        # LPIPS
        seen = recon.detach().float().requires_grad_()
        with torch.no_grad():
            targets = self._timed("LPIPS, images", lambda: perceptual.features(images))
        features = self._timed("LPIPS, reconstructions", lambda: perceptual.features(seen))
        distance = perceptual.distance(targets, features).sum()
        self._timed("LPIPS, backward", lambda: _gradient(distance, seen))

        # adversarial term
        adversary = task.adversary(0)
        assert adversary is not None
        logits = self._timed("discriminator, for the model", lambda: adversary.discriminator(seen))
        self._timed("discriminator, backward to the images", lambda: _gradient(logits.sum(), seen))

        # backward, discriminator and optimisers
        self._timed("decoder, backward", lambda: _backward(recon))
        self._timed("encoder, backward", lambda: _backward(moments))
        self._timed(
            "discriminator's own update",
            lambda: backward_discriminator(images, recon, adversary=adversary),
        )
        self._timed("clip, optimisers, average", self._step)
        return self.parts

    def _step(self) -> None:
        clip_gradients(self.step.task.wrapper.parameters(), 1.0)
        self.step.updates.step(self.step.task.learning(0))

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        with torch.autocast(
            self.images.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        ):
            with FlopCounterMode(display=False) as counter:
                result = call()
            seconds = median(timed(call) for _ in range(self.runs))
        self.parts.append(Part(name, seconds, counter.get_total_flops()))
        print(f"{name}: {seconds:.3f} s", flush=True)
        return result


def _gradient(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss, at, retain_graph=True)[0]


def _backward(output: Tensor) -> None:
    output.backward(torch.ones_like(output), retain_graph=True)


def peak(precision: Precision, runs: int) -> float:
    """Return the machine's peak speed, in floating-point operations per second."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    matrix = torch.randn(4096, 4096, dtype=dtype)
    maps, kernel = torch.randn(8, 256, 32, 32, dtype=dtype), torch.randn(256, 256, 3, 3).to(dtype)
    rates = []
    for call in (lambda: matrix @ matrix, lambda: F.conv2d(maps, kernel, padding=1)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        with torch.no_grad():
            rates.append(counter.get_total_flops() / min(timed(call) for _ in range(runs)))
    return max(rates)


def table(parts: list[Part], best: float, title: str) -> Table:
    """Return a table of the parts and their sum."""
    shown = Table(title=f"{title}; peak {best / 1e9:.0f} GFLOP/s")
    for column in ("part", "s", "share of time", "GFLOP", "GFLOP/s", "share of peak"):
        shown.add_column(column)
    total = sum(part.seconds for part in parts)
    whole = Part("all", total, sum(part.flops for part in parts))
    for part in (*parts, whole):
        rate = part.flops / part.seconds
        values = f"{part.seconds:.3f}", f"{part.seconds / total:.1%}", f"{part.flops / 1e9:.1f}"
        shown.add_row(part.name, *values, f"{rate / 1e9:.0f}", f"{rate / best:.0%}")
    return shown


def run(options: Options) -> None:
    """Measure each precision at each resolution, and print a table for each such pair."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    keep_freed_memory(torch.device("cpu"))  # as `train` does
    for precision in options.precision:
        best = peak(precision, options.runs)
        for resolution in options.resolution:
            batch = BATCH_SIZES.get(resolution, 4)
            parts = Parts(photos(resolution, batch), precision, options.runs).measure()
            title = f"one update, {resolution} px, batch {batch}, {precision}"
            Console(width=120).print(table(parts, best, title))


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="step_parts.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
