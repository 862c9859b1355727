"""Compare ways to encode and decode large images: at once, in diffusers' tiles, in exact strips.

    python benchmarks/large_images.py --model sd --sizes 512 1024 --json large.json

Each value is measured in a new process. Memory is the rise of the process's resident memory during
the call. Strips are this project's way to compute large images, with the same result as for the
whole image. In every row, `ours` is the cost (time or memory) with strips, and `reference` is the
cost with tiles or with the whole image. `equal within` is the largest difference from the output
for the whole image. Rows that compare with the whole image give this difference for the output of
strips. Rows that compare with tiles give this difference for the output of tiles.

The script also prints the largest seam of diffusers' tiles (a step of the image at a tile border),
in 8-bit levels. A seam above 2 levels is visible (latentvae/evaluation/tiling_check.py). diffusers
does not tile images that are no larger than a tile, so there is no comparison with tiles at such
sizes.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from timing import Row, collected, finish, row
from torch import Tensor

from latentvae.cli.flags import exit_with, parse_options
from latentvae.compute.strips import StripComputation, Strips
from latentvae.errors import UserError
from latentvae.evaluation.speed import MIB, peak_memory
from latentvae.evaluation.tiling_check import seam_between
from latentvae.models import calls, load_network
from latentvae.models.conv.kl import build_autoencoder_kl, downsampling_factor

SHAPES: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (128, 256, 512, 512)},
    "kl_small": {
        "block_out_channels": (32, 64, 128, 128),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
}
CALLS = ("encode", "decode")
WAYS = ("stock", "tiles", "strips")


@dataclass(frozen=True)
class Options:
    """What to measure, and where to write the results."""

    model: str = "sd"
    """Folder of an AutoencoderKL, or `sd` or `kl_small`. `sd` means a network with the layers of
    Stable Diffusion's autoencoder. `kl_small` means a network with the layers of the preset
    kl_small. The networks of `sd` and `kl_small` have random weights."""

    sizes: tuple[int, ...] = (512, 1024)
    """Sides of the images in pixels."""

    storage: Literal["memory", "disk"] = "disk"
    """Place where feature maps are stored while an image is computed strip by strip (in bands of
    rows)."""

    folder: Path | None = None
    """Folder for temporary files. Default: the system's folder for temporary files."""

    json: Path | None = None
    """JSON file to write the results to."""


def run(options: Options) -> None:
    """Measure all image sizes, and print the table of results."""
    rows = collected(measured(options))
    finish(rows, title=f"strips on {options.storage}, {options.model}", json_file=options.json)


def measured(options: Options) -> Iterator[Row]:
    """Measure encode and decode at each image size. Yield table rows, and print tiles' seams."""
    tile = _build(options.model).tile_sample_min_size
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for size in options.sizes:
            for call in CALLS:
                ways = ways_at(size, tile=tile)
                found = {way: _in_a_process(options, call, way, size, folder) for way in ways}
                yield from _rows(f"{call} {size} px fp32", found, Path(folder))
                if call == "decode" and "tiles" in ways:
                    _print_seam(options.model, size, Path(folder))


def ways_at(size: int, *, tile: int) -> tuple[str, ...]:
    """Return the names of the ways to compute (stock, tiles, strips) that work at this image size.

    The way `stock` computes the whole image at once. diffusers tiles only images that are larger
    than a tile.
    """
    return tuple(way for way in WAYS if way != "tiles" or size > tile)


def _in_a_process(
    options: Options, call: str, way: str, size: int, folder: str
) -> dict[str, float]:
    arguments = [options.model, call, way, str(size), folder, options.storage]
    command = [sys.executable, __file__, "--measure", *arguments]
    # The command runs this file with this Python. The arguments are a list, so no shell reads them.
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def _rows(name: str, found: dict[str, dict[str, float]], folder: Path) -> list[Row]:
    results = {way: load_file(folder / f"{way}.safetensors")["result"] for way in found}
    rows = []
    for unit in ("MiB", "s"):
        for other in (way for way in found if way != "strips"):
            compared = results["strips" if other == "stock" else "tiles"]
            difference = (compared - results["stock"]).abs().max().item()
            values = [found["strips"][unit]], [found[other][unit]]
            rows.append(row(f"{name}: {other}", unit, *values, equal_within=difference))
    return rows


def _print_seam(model: str, size: int, folder: Path) -> None:
    whole, tiled = (
        load_file(folder / f"{way}.safetensors")["result"] for way in ("stock", "tiles")
    )
    net = _build(model)
    f, tile = downsampling_factor(net), net.tile_latent_min_size
    overlap = int(tile * net.tile_overlap_factor)
    seam = seam_between(tiled, whole, tile=tile, overlap=overlap, f=f)
    Console().print(f"decode {size} px: the tiles' largest seam is {seam:.1f} levels of 255")


def _build(model: str) -> Any:
    if model not in SHAPES:
        return load_network(model).eval()
    torch.manual_seed(0)
    return build_autoencoder_kl(sample_size=512, **SHAPES[model]).eval()


@torch.inference_mode()
def measure(model: str, call: str, way: str, size: str, folder: str, storage: Any) -> None:
    """Measure one encode or decode in this process.

    The function prints the peak memory in MiB and the seconds as JSON, and saves the output.
    """
    # network
    net = _build(model)
    strips = Strips(storage=storage, folder=Path(folder)) if way == "strips" else None
    if way == "tiles":
        net.enable_tiling()

    def work(inputs: Tensor) -> Tensor:
        run_call: Any = calls.encode if call == "encode" else calls.decode
        return run_call(
            net, inputs, computation=None if strips is None else StripComputation(strips)
        )

    work(_inputs(net, call, 64))  # a first call, so that one-time allocations do not count

    # measured call
    inputs = _inputs(net, call, int(size))
    with peak_memory(torch.device("cpu")) as peak:
        start = time.perf_counter()
        result = work(inputs)
        seconds = time.perf_counter() - start
    save_file({"result": result.contiguous()}, Path(folder) / f"{way}.safetensors")
    process = psutil.Process().memory_info().rss / MIB
    print(json.dumps({"MiB": peak[0] / MIB, "s": seconds, "process": process}))


def _inputs(net: Any, call: str, size: int) -> Tensor:
    """Return smooth noise: random values that are enlarged 8 times by interpolation.

    The noise is an image in [-1, 1] for the call "encode", and a latent for the call "decode".
    """
    f = downsampling_factor(net)
    channels, side = (
        (calls.image_channels(net), size)
        if call == "encode"
        else (net.config["latent_channels"], size // f)
    )
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, channels, max(side // 8, 1), max(side // 8, 1), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return smooth.clamp(-1, 1) if call == "encode" else smooth


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    try:
        run(parse_options(Options, sys.argv[1:], prog="large_images.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
