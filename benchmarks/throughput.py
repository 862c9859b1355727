"""Encode, decode and round trip: time an image and peak memory, beside diffusers called plainly.

    python benchmarks/throughput.py --model runs/NAME/export --sizes 256 512 1024 --json FILE

Without a model, one of Stable Diffusion's shape with random weights. The reference is the network
in float32, eager, on the whole image; the ways to compute it are those of `latentvae.load`
(`exact`, `fast`, `openvino`, `strips`) and diffusers' own (`tiled`, `cast` to bfloat16, `compiled`
by torch). All take turns; `equal_within` is the largest difference of latents or pixels (range 2).
Peak memory is what a call takes beyond the network, each measured in a process of its own.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import Row, alternate, finish, row
from torch import Tensor
from ways import CALLS, WAYS, Way, build, installed, network, peak

from latentvae.errors import UserError, nearest
from latentvae.flags import exit_with, parse_options
from latentvae.models.calls import image_channels, measure_shape


@dataclass(frozen=True)
class Options:
    """What to measure and where to write it."""

    json: Path | None = None
    """File for the numbers."""

    model: str | None = None
    """Folder or Hub id of an autoencoder; left out, Stable Diffusion's shape, random weights."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Widths of the random one."""

    sizes: tuple[int, ...] = (256, 512, 1024)
    """Sides of the images in pixels."""

    batch_size: int = 1
    """Images of a call."""

    ways: tuple[str, ...] = ()
    """Which to compare with the plain call; by default all that are installed."""

    runs: int = 5
    """Timed calls of each way, in turns, after one to warm up."""

    memory: bool = True
    """Measure peak memory too."""

    threads: int | None = None
    """CPU threads; by default all cores."""

    device: str = "cpu"
    """Where to run: cpu or cuda."""

    quick: bool = False
    """The short form: `exact` and `fast` at 256 px, three runs, no memory."""


def checked(options: Options) -> Options:
    """With what follows from it filled in."""
    if options.quick:
        ways = options.ways or ("exact", "fast")
        options = replace(options, sizes=options.sizes[:1], ways=ways, runs=3, memory=False)
    for name in options.ways:
        if name not in WAYS or name == "plain":
            known = [way for way in WAYS if way != "plain"]
            text = f"there is no way '{name}', only {', '.join(known)}{nearest(name, known)}"
            raise UserError(text)
    return replace(options, ways=options.ways or installed())


def measure(options: Options) -> Iterator[Row]:
    net = network(options.model, options.channels, options.device)
    shape, channels = measure_shape(net), image_channels(net)
    plain = build("plain", net)
    built = {name: build(name, net) for name in options.ways}
    ways = {name: way for name, way in built.items() if way is not None}
    assert plain is not None
    for name, way in ways.items():
        print(f"{name}: {way.note}" if way.note else name)
    for size in options.sizes:
        side = size // shape.f * shape.f
        images = noise((options.batch_size, channels, side, side)).to(options.device)
        z = plain.encode(images)
        for call in CALLS:
            yield from times(call, z if call == "decode" else images, plain, ways, options)
        if options.memory:
            yield from peaks(tuple(images.shape), ways, options)


def times(
    call: str, inputs: Tensor, plain: Way, ways: dict[str, Way], options: Options
) -> Iterator[Row]:
    calls = {name: function(way, call) for name, way in {"plain": plain, **ways}.items()}
    expected = calls["plain"](inputs)
    errors = {name: calls[name](inputs) - expected for name in ways}
    seconds = alternate(
        {name: lambda f=f: f(inputs) for name, f in calls.items()},
        runs=options.runs,
        warmup=0,  # the results above were one
        per=options.batch_size,
    )
    size = (expected if call == "decode" else inputs).shape[-1]
    for name, way in ways.items():
        title = f"{call}, {size} px, {name}, {way.precision}"
        ours, theirs = seconds[name], seconds["plain"]
        mse = errors[name].double().square().mean().item()
        print(f"{title}: {speed(ours)}, plain {speed(theirs)}; mean squared error {mse:.1e}")
        largest = errors[name].abs().max().item()
        yield row(title, "s/image", ours, theirs, equal_within=largest)


def function(way: Way, call: str) -> Any:
    if call == "round trip":
        return lambda images: way.decode(way.encode(images))
    return getattr(way, call)


def speed(seconds: list[float]) -> str:
    return f"{1 / median(seconds):.3g} images/s"


def peaks(shape: tuple[int, ...], ways: dict[str, Way], options: Options) -> Iterator[Row]:
    found = {name: peak_of(name, shape, options) for name in ("plain", *ways)}
    for call in ("encode", "decode"):
        for name, way in ways.items():
            title = f"peak memory, {call}, {shape[-1]} px, {name}, {way.precision}"
            ours, theirs = max(found[name][call], 1.0), found["plain"][call]
            yield row(title, "MiB", [ours], [theirs], equal_within=None)


def peak_of(name: str, shape: tuple[int, ...], options: Options) -> dict[str, float]:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        given = (options.model, options.channels, options.device, options.threads)
        return executor.submit(peak, name, shape, *given).result()


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def run(options: Options) -> None:
    options = checked(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = list(measure(options))
    finish(rows, title="encode and decode", json_file=options.json)


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="throughput.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
