"""Compare plain diffusers with other ways to encode and decode images, by time and peak memory.

    python benchmarks/throughput.py --model runs/NAME/export --sizes 256 512 1024 --json FILE

Without `--model`, the script trains a network with the layers of Stable Diffusion's autoencoder for
some updates. The reference is plain diffusers: the network in float32 on the whole image, without
compilation. The script compares the reference with other ways to run the network. The ways `exact`,
`fast`, `openvino` and `strips` are modes of `latentvae.load`. The ways `tiled`, `cast` (to
bfloat16), `compiled` (by torch) and `compiled cast` use diffusers. The calls of each way alternate
with calls of the reference. Each way and the reference run in separate processes, because the
setting to keep freed memory (`latentvae.compute.memory`) applies to a whole process.

`equal_within` is the largest difference from the output of the reference: of latents, or of pixels
in [-1, 1]. Peak memory is the most memory in use during a call, without the network's weights.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import Row, alternate, finish, line, own_process, row
from torch import Tensor
from ways import CALLS, WAYS, Way, build, installed, network, peak, trained

from latentvae.cli.flags import exit_with, parse_options
from latentvae.compute.memory import release_freed_memory
from latentvae.data import EvalTransform, open_source
from latentvae.errors import UserError, nearest
from latentvae.models.calls import image_channels, measure_shape


@dataclass(frozen=True)
class Options:
    """What to measure, and where to write the results."""

    json: Path | None = None
    """JSON file to write the results to."""

    model: str | None = None
    """Folder or Hub id of an autoencoder. By default, the script itself trains a network with the
    layers of Stable Diffusion's autoencoder (see channels and updates)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Number of channels of each level of the network that the script trains, if `model` is not
    given."""

    updates: int = 30
    """Number of updates with which the script trains the network, if `model` is not given. Training
    uses two sample photos at 64 px. With 0, the weights stay random. With random weights, bfloat16
    is too inexact, so the mode `fast` computes in float32."""

    sizes: tuple[int, ...] = (256, 512, 1024)
    """Sides of the images in pixels."""

    batch_size: int = 1
    """Number of images per call."""

    ways: tuple[str, ...] = ()
    """Names of the ways to run the network, such as exact, fast or tiled. The description of the
    script explains these ways. Each way is compared with the unchanged network in float32 (the
    reference). Default: all ways whose packages are installed."""

    runs: int = 5
    """Number of timed calls of each way to run the network, after two untimed calls. The calls
    alternate with calls of the unchanged network (the reference)."""

    memory: bool = True
    """Also measure the peak memory of each call."""

    threads: int | None = None
    """Number of CPU threads. Default: all cores."""

    device: str = "cpu"
    """Device to run on: cpu or cuda."""

    quick: bool = False
    """Make a short measurement: only the ways `exact` and `fast`, only the first size (256 px),
    three timed calls, and no measurement of memory."""


def checked(options: Options) -> Options:
    """Return the options with the changes that `quick` makes, and with the default of `ways`.

    Raises:
        UserError: `ways` contains an unknown name.
    """
    if options.quick:
        ways = options.ways or ("exact", "fast")
        options = replace(options, sizes=options.sizes[:1], ways=ways, runs=3, memory=False)
    for name in options.ways:
        if name not in WAYS or name == "stock":
            known = [way for way in WAYS if way != "stock"]
            allowed, hint = ", ".join(known), nearest(name, known)
            raise UserError(f"Each value of `ways` must be one of {allowed} (got '{name}'){hint}")
    return replace(options, ways=options.ways or installed())


def measure(options: Options) -> Iterator[Row]:
    """Yield the rows of each image size: first rows of time, then rows of peak memory."""
    compared = compare(options)
    release_freed_memory()  # so that the new processes can use this memory
    times: dict[tuple[int, str, str], Row] = {}
    with own_process(serve, "stock", options) as stock:
        for name in dict.fromkeys(name for *_, name in compared):
            with own_process(serve, name, options) as way:
                times |= {
                    key: time(key, stock, way, found, options)
                    for key, found in compared.items()
                    if key[2] == name
                }
    memory = peaks(compared, options) if options.memory else {}
    for size in options.sizes:
        yield from (times[key] for key in compared if key[0] == size)
        yield from memory.get(size, ())


@dataclass(frozen=True)
class Compared:
    """The difference between the output of a way to run the network and that of plain diffusers.

    Attributes:
        way: name of the way. If the way falls back to another way, the name of that way is added.
        precision: `"fp32"` or `"bf16"`.
        side: side of the images in pixels.
        largest: largest absolute difference of the outputs.
        mse: mean squared difference of the outputs.
    """

    way: str
    precision: str
    side: int
    largest: float
    mse: float


def compare(options: Options) -> dict[tuple[int, str, str], Compared]:
    """Return the output differences of each way from plain diffusers, by (size, call, way).

    The function also prints how each way computes on this machine.
    """
    # ways
    net = network(_model(options), options.device)
    stock = build("stock", net)
    built = {name: build(name, net) for name in options.ways}
    ways = {name: way for name, way in built.items() if way is not None}
    assert stock is not None
    for name, way in ways.items():
        print(f"{name}: {way.note}" if way.note else name, flush=True)

    # differences
    found = {}
    f = measure_shape(net).f
    for size in options.sizes:
        side = size // f * f
        inputs = inputs_of(stock, side, options)
        for call in CALLS:
            expected = function(stock, call)(inputs[call])
            for name, way in ways.items():
                error = function(way, call)(inputs[call]) - expected
                mse = error.double().square().mean().item()
                label = f"{name} (fell back to {way.fallback})" if way.fallback else name
                found[size, call, name] = Compared(
                    label, way.precision, side, error.abs().max().item(), mse
                )
    return found


def _model(options: Options) -> str:
    assert options.model is not None  # without `--model`, `run` trains a network
    return options.model


def serve(name: str, options: Options) -> Callable[[str, int], Tensor]:
    """Return a function that encodes, decodes or reconstructs images in the way called `name`.

    Call `serve` in a new process. The arguments of the returned function are the name of the
    call and the side of the images.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    way = build(name, network(_model(options), options.device))
    assert way is not None
    inputs = lru_cache(lambda side: inputs_of(way, side, options))
    return lambda call, side: function(way, call)(inputs(side)[call])


def inputs_of(way: Way, side: int, options: Options) -> dict[str, Tensor]:
    """Return the input of each call by the call's name: images, or latents of these images."""
    images = noise((options.batch_size, image_channels(way.net), side, side)).to(options.device)
    return {"encode": images, "decode": way.encode(images), "round trip": images}


def time(key: tuple[int, str, str], stock: Any, way: Any, found: Compared, options: Options) -> Row:
    """Time calls of a way and of plain diffusers alternately. Print both speeds, return the row."""
    _, call, name = key
    seconds = alternate(
        {"stock": partial(stock, call, found.side), name: partial(way, call, found.side)},
        runs=options.runs,
        warmup=2,
        per=options.batch_size,
        clock=lambda run: run(),
    )
    ours, theirs = seconds[name], seconds["stock"]
    title = f"{call}, {found.side} px, {found.way}, {found.precision}"
    compared = f"{speed(ours)}, plain diffusers {speed(theirs)}, mean squared error {found.mse:.1e}"
    print(f"{title}: {compared}", flush=True)
    return row(title, "s/image", ours, theirs, equal_within=found.largest)


def function(way: Way, call: str) -> Any:
    if call == "round trip":
        return lambda images: way.decode(way.encode(images))
    return getattr(way, call)


def speed(seconds: list[float]) -> str:
    return f"{1 / median(seconds):.3g} images/s"


def peaks(compared: dict[tuple[int, str, str], Compared], options: Options) -> dict[int, list[Row]]:
    """Measure the peak memory of all ways, and return the rows of each image size."""
    ways = {name: (found.way, found.precision) for (*_, name), found in compared.items()}
    sides = {size: found.side for (size, *_), found in compared.items()}
    rows: dict[int, list[Row]] = {}
    for size, side in sides.items():
        found = {name: peak_of(name, side, options) for name in ("stock", *ways)}
        for call in ("encode", "decode"):
            for name, (label, precision) in ways.items():
                title = f"peak memory, {call}, {side} px, {label}, {precision}"
                ours, theirs = max(found[name][call], 1.0), found["stock"][call]
                made = row(title, "MiB", [ours], [theirs], equal_within=None)
                print(line(made), flush=True)
                rows.setdefault(size, []).append(made)
    return rows


def peak_of(name: str, side: int, options: Options) -> dict[str, float]:
    """Return the peak MiB of encode and decode of a batch of images, measured in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        given = (_model(options), options.device, options.threads)
        return executor.submit(peak, name, options.batch_size, side, *given).result()


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def run(options: Options) -> None:
    """Measure all image sizes, and print the table of results."""
    options = checked(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            print(f"training a network for {options.updates} updates", flush=True)
            given = {"updates": options.updates, "device": options.device}
            net = trained(options.channels, images=_photos(), **given)
            net.save_pretrained(folder)
            options = replace(options, model=folder)
        rows = list(measure(options))
    finish(rows, title="encode and decode", json_file=options.json)


def _photos() -> Tensor:
    """Return two sample photos (2, 3, 64, 64) in [-1, 1]."""
    source, transform = open_source("samples"), EvalTransform((64, 64))
    return torch.stack([transform(source.read(i)) for i in range(2)])


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="throughput.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
