"""Compare the speed of this project's data loader with that of a plain Pillow image folder.

    python benchmarks/data.py --json data.json

The script prints a table and writes JSON. Each ratio is the time of the plain folder divided by the
time of our loader.

The images are JPEGs of quality 90 with a shorter side of 1,000 pixels, made from resized photos.
The JPEGs are in a temporary folder and also in tar files. Crops have 256 pixels on a side. Every
file is read once before the timing, so that the time of the disk does not count. torch has one
thread, so a row without workers shows the speed of one core.

The plain folder reads images as many training scripts do. Pillow opens a file and converts it to
RGB. A random square is cropped, resized and mirrored. torchvision converts the crop to a tensor and
normalises it. torch's DataLoader makes the batch. Our loader also returns floats in [-1, 1]. Both
loaders draw random squares in the same way, with sides of 0.5 to 1 of the image's shorter side. The
name of a table row contains the resize kernel of both loaders. For each number of workers, one row
compares different kernels: our default, Lanczos, and torchvision's default, bilinear.

`equal within` is the largest difference between the pixels of both loaders for the same crop. The
range of pixels is [-1, 1]. The outer three pixels of a crop are not compared. These pixels differ,
because the plain folder resizes after cropping, and does not use the pixels around the crop.
"""

import itertools
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from timing import Row, alternate, collected, finish, row
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentvae.cli.flags import exit_with, parse_options
from latentvae.data import (
    ImageSource,
    IndexSampler,
    TrainImages,
    TrainTransform,
    normalised,
    open_source,
    train_loader,
)
from latentvae.data.resampling import INTERPOLATIONS
from latentvae.data.transforms import Window
from latentvae.errors import UserError

SIDE, RESOLUTION, QUALITY = 1000, 256, 90
SHARES = (0.5, 1.0)  # smallest and largest side of a crop, as shares of the image's shorter side
BATCH = 8
SHARDS = 4
EDGE = 3  # pixels: half the width of the Lanczos kernel
KERNELS = ("lanczos", "bilinear")  # our default, and torchvision's default
TRANSFORMS = {
    name: TrainTransform(RESOLUTION, crop_scale=SHARES, random_flip=True, interpolation=name)
    for name in KERNELS
}


@dataclass(frozen=True)
class Options:
    """Which images to read, how to measure, and where to write the results."""

    data: str = "samples"
    """Folder of photos to make the JPEGs from. `samples` means 21 photos that are
    installed with latentvae."""

    json: Path | None = None
    """JSON file to write the results to."""

    images: int = 128
    """Number of JPEGs. This number must be a multiple of 16. Every timed run reads all these
    JPEGs."""

    runs: int = 7
    """Number of timed runs of each of the two data loaders, after one untimed run. The runs of the
    two loaders alternate."""

    workers: tuple[int, ...] = (0, 2)
    """Numbers of worker processes. Each of the two data loaders is measured with each of these
    numbers."""

    quick: bool = False
    """Make a short measurement with 32 images, three runs and no workers."""


class PlainFolder(Dataset[Tensor]):
    """A dataset of a folder's JPEGs, read as many training scripts read JPEGs.

    Each item is a random crop (C, R, R) in [-1, 1].
    """

    def __init__(self, root: Path, interpolation: str) -> None:
        self.paths = sorted(root.iterdir())
        self.kernel = INTERPOLATIONS[interpolation]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        share, x, y, flip = torch.rand(4).tolist()
        low, high = SHARES
        return self.window(index, Window(low + share * (high - low), x, y, flip=flip < 0.5))

    def window(self, index: int, window: Window) -> Tensor:
        with Image.open(self.paths[index]) as opened:
            image = opened.convert("RGB")
        image = image.crop(window.box(image.size))
        image = image.resize((RESOLUTION, RESOLUTION), self.kernel)
        if window.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return TF.normalize(TF.to_tensor(image), [0.5] * 3, [0.5] * 3)


def write_jpegs(photos: ImageSource, root: Path, count: int) -> None:
    """Write ``count`` JPEGs to ``root/jpegs``, and tar files of the same JPEGs to ``root/shards``.

    If there are fewer photos than ``count``, photos are repeated.
    """
    folder, shards = root / "jpegs", root / "shards"
    folder.mkdir()
    shards.mkdir()

    # images
    for i in range(count):
        path = folder / f"{i:05d}.jpg"
        if i >= len(photos):
            path.write_bytes((folder / f"{i % len(photos):05d}.jpg").read_bytes())
            continue
        photo = photos.read(i)
        assert isinstance(photo, Image.Image)
        scale = SIDE / min(photo.size)
        size = (round(photo.width * scale), round(photo.height * scale))
        photo.resize(size, Image.Resampling.LANCZOS).save(path, quality=QUALITY)

    # the same JPEGs in tar files (shards)
    paths = sorted(folder.iterdir())
    for i in range(SHARDS):
        with tarfile.open(shards / f"{i:03d}.tar", "w") as writer:
            for path in paths[i::SHARDS]:
                writer.add(path, path.name)


def plain(folder: PlainFolder, *, workers: int) -> Callable[[], object]:
    """Return a function that reads every image once with the plain loader."""

    def call() -> None:
        for images in DataLoader(folder, BATCH, shuffle=True, num_workers=workers):
            assert len(images) == BATCH

    return call


def ours(
    source: ImageSource, interpolation: str, *, workers: int, crops: int = 1
) -> Callable[[], object]:
    """Return a function that reads crops with our loader, as many as there are images."""

    def call() -> None:
        dataset = TrainImages(source, TRANSFORMS[interpolation], seed=0, crops=crops)
        order = IndexSampler(len(source), BATCH // crops, seed=0)
        keys = list(itertools.islice(order, len(source) // BATCH))
        for batch in train_loader(dataset, keys, num_workers=workers):
            assert batch.on("cpu").shape[0] == BATCH

    return call


def difference(source: ImageSource, folder: PlainFolder, interpolation: str) -> float:
    """Return the largest difference between both loaders' crops of 16 images, without edges."""
    transform, largest = TRANSFORMS[interpolation], 0.0
    for i in range(min(len(source), 16)):
        window = transform.draw(np.random.default_rng(i))
        image = source.read(i, at_least=transform.needed_side([window]))
        off = (normalised(transform.apply(image, window)) - folder.window(i, window)).abs()
        largest = max(largest, off[:, EDGE:-EDGE, EDGE:-EDGE].max().item())
    return largest


def compare(root: Path, options: Options) -> Iterator[Row]:
    """Yield table rows for each number of workers, then for decoding and cropping one image."""
    folders = {name: PlainFolder(root / "jpegs", name) for name in KERNELS}
    sources = {
        "folder": open_source(root / "jpegs"),
        "tar shards": open_source(root / "shards"),
    }
    equal = {
        (form, name): difference(sources[form], folders[name], name)
        for form, name in itertools.product(sources, KERNELS)
    }
    for workers in options.workers:
        yield from with_workers(workers, folders, sources, equal, options)
    yield from stages(root, options)


def with_workers(
    workers: int,
    folders: Mapping[str, PlainFolder],
    sources: Mapping[str, ImageSource],
    equal: Mapping[tuple[str, str], float],
    options: Options,
) -> Iterator[Row]:
    """Time both loaders with this number of workers, and yield the rows of the table.

    Args:
        folders: for each resize kernel, the dataset of the plain loader.
        sources: for each form (folder or tar shards), the images for our loader.
        equal: for each form and kernel, the largest difference between both loaders' pixels.
    """
    # calls
    calls = {f"plain {name}": plain(folders[name], workers=workers) for name in KERNELS}
    for form, name in equal:
        calls[f"{form} {name}"] = ours(sources[form], name, workers=workers)
    calls["crops lanczos"] = ours(sources["folder"], "lanczos", workers=workers, crops=4)
    seconds = alternate(calls, runs=options.runs, per=options.images)

    # rows
    by = f"{workers} workers" if workers else "one core"

    def made(name: str, form: str, kernel: str, other: str, within: float | None) -> Row:
        times = seconds[f"{form} {kernel}"], seconds[f"plain {other}"]
        return row(f"{name}, {by}", "s/image", *times, equal_within=within)

    for (form, name), within in equal.items():
        yield made(f"{form}, {name}", form, name, name, within)
    yield made("folder, lanczos, 4 crops of each", "crops", "lanczos", "lanczos", None)
    yield made("folder, ours lanczos, plain bilinear", "folder", "lanczos", "bilinear", None)


def stages(root: Path, options: Options) -> Iterator[Row]:
    """Yield a row for decoding an image (equal for both loaders), and a row for cropping it."""
    path = sorted((root / "jpegs").iterdir())[0]
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    window = Window(sum(SHARES) / 2)
    box, size = window.box(image.size), (RESOLUTION, RESOLUTION)

    def decode() -> None:
        with Image.open(path) as opened:
            opened.load()

    def pillow() -> Tensor:
        cut = image.crop(box).resize(size, Image.Resampling.LANCZOS)
        return TF.normalize(TF.to_tensor(cut), [0.5] * 3, [0.5] * 3)

    calls = {
        "decode": decode,
        "pillow": pillow,
        "ours": lambda: normalised(TRANSFORMS["lanczos"].apply(image, window)),
    }
    many = {name: (lambda call=call: [call() for _ in range(20)]) for name, call in calls.items()}
    seconds = alternate(many, runs=options.runs, per=20)

    decoding = seconds["decode"]
    yield row("decode alone", "s/image", decoding, decoding, equal_within=0.0)
    yield row("crop, lanczos", "s/image", seconds["ours"], seconds["pillow"], equal_within=None)


def run(options: Options) -> None:
    """Write the JPEGs, time both loaders, and print the table of results."""
    if options.quick:
        options = replace(options, images=32, runs=3, workers=(0,))
    if options.images < 16 or options.images % 16:
        raise UserError(f"images must be a multiple of 16 (got {options.images}).")
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_jpegs(open_source(options.data, split="train"), root, options.images)
        size = sum(path.stat().st_size for path in (root / "jpegs").iterdir()) / options.images
        rows = collected(compare(root, options))

    title = f"{options.images} JPEGs of {SIDE:,} px (mean {size / 1e3:.0f} kB) to {RESOLUTION} px"
    finish(rows, title=title, json_file=options.json)


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="data.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
