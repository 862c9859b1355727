"""Run pictures through an autoencoder and show the result: side-by-side pictures and a table.

    reconstruct("runs/demo/export", ["photo.jpg", "album/"], out="out")  # from Python
    latentvae reconstruct runs/demo/export photo.jpg album/ --out out    # from a shell

Each picture is measured at its own size (or as shrunk to `max_side`), after rounding to 8 bits.
Pictures of more than 8 bits are not rounded if the model is grey or RGBA. Pictures that are read
with a `value_range` are never rounded. For the rounding of reconstructions, see
`metrics.round_alike`.
"""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tqdm import tqdm

from latentvae.autoencoder import Autoencoder, load
from latentvae.compute.optimization import Optimize
from latentvae.compute.precision import full_float32
from latentvae.data import (
    DeepImage,
    ImageFolder,
    Picture,
    PixelFormat,
    UnreadableImage,
    read_image,
    set_pixel_limit,
    to_tensor,
)
from latentvae.data.pages import find_pages, is_tiff
from latentvae.errors import UserError, first_line, nearest, printable
from latentvae.losses.colors import to_rgb
from latentvae.losses.perceptual import MIN_SIZE, PerceptualLoss, load_lpips
from latentvae.metrics import psnr, round_alike, ssim
from latentvae.metrics.image import SSIM_MIN_SIZE
from latentvae.pictures import to_pil, to_uint16
from latentvae.text import spreadsheet_text

DIFFERENCE_GAIN = 4.0  # factor on the differences that a PNG shows
GAP = 8  # width in pixels of the white gaps in a PNG
NAME_WIDTH = 32  # characters of an image's name in the printed table, which fits 80 columns


@dataclass(frozen=True)
class Row:
    """A row of the table of metrics. A metric is None if the picture is too small for it."""

    image: str
    width: int
    height: int
    psnr: float
    ssim: float | None
    lpips_alex: float | None
    picture: str


@dataclass(frozen=True)
class Reconstructions:
    """The results: a table row per picture, and (path, reason) for each picture left out."""

    rows: tuple[Row, ...]
    left_out: tuple[tuple[str, str], ...]


@full_float32()
def reconstruct(
    model: Autoencoder | str | Path,
    inputs: Sequence[str | Path],
    *,
    out: str | Path,
    max_side: int | None = None,
    strips: bool = False,
    value_range: tuple[float, float] | None = None,
    ignore_icc: bool = False,
    max_pixels: int | None = None,
    optimize: Optimize | None = None,
    variant: str | None = None,
) -> Reconstructions:
    """Write a PNG per picture (original, reconstruction, difference), and a table of metrics.

    The table is printed and written to table.csv. A PNG has as many channels as the model's images.
    The PNG has 8 bits per channel. Only if the model is grey, the PNG has 16 bits for a picture of
    more than 8 bits, or for a picture that is read with `value_range`.

    Args:
        model: an `Autoencoder`, or the folder or Hub id of a model. A model that this function
            loads runs on the GPU if there is a GPU.
        inputs: image files and folders. Folders are searched with all their subfolders.
        out: folder of the results. Existing files of the same name are overwritten.
        max_side: shrink pictures whose longer side has more pixels than this. None means that no
            picture is shrunk.
        strips: compute each picture strip by strip to save memory, see `Autoencoder`. `strips` has
            an effect only if `model` is a folder or Hub id.
        value_range: the numbers that files store for black and white, as in training. Files with
            floating-point values need `value_range` if the model is grey or RGBA.
        ignore_icc: keep the stored numbers of files with an embedded colour profile. By default,
            files with a colour profile are converted to sRGB.
        max_pixels: read images of up to this many pixels, see `data.set_pixel_limit`.
        optimize: mode of faster computation, see `load`. `optimize` has an effect only if `model`
            is a folder or Hub id.
        variant: variant of the weights in a folder, such as `"fp16"`.

    Raises:
        UserError: a path does not exist, a PNG would overwrite an input, or no picture can be
            reconstructed.
    """
    # Files are checked before the weights are read.
    if not inputs:
        raise UserError("no images: give image files or folders of images")
    set_pixel_limit(max_pixels)
    out = Path(out).expanduser()
    targets = list(_name_pictures(_find_files(inputs, out=out)))
    _keep_inputs(targets, out)

    # model and metric
    if not isinstance(model, Autoencoder):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(model, device=device, optimize=optimize, strips=strips, variant=variant)
    lpips = PerceptualLoss(load_lpips("alex")).to(model.net.device)
    pixels = PixelFormat(
        model.image_channels,
        value_range,
        ignore_icc=ignore_icc,
        keep_depth=value_range is not None or model.image_channels != 3,
    )

    # pictures
    rows: list[Row] = []
    left_out: list[tuple[str, str]] = []
    for path, picture in tqdm(targets, desc=model.name, unit="image", leave=False):
        try:
            image = _shrink(read_image(path, pixels=pixels), max_side)
            images = to_tensor(image)[None].to(model.net.device)  # (1, C, H, W)
            recon = round_alike(_reconstructed(model, images, path), images)
        except UnreadableImage as error:
            left_out.append((str(path), error.reason))
            continue

        _save(out / picture, images, recon, deep=isinstance(image, DeepImage))
        rows.append(_measure(images, recon, lpips=lpips, image=str(path), picture=picture))

    _finish(rows, left_out, out=out, name=_title(model))
    return Reconstructions(tuple(rows), tuple(left_out))


def _reconstructed(model: Autoencoder, images: Tensor, path: Path) -> Tensor:
    """Reconstruct one picture. The caller skips the picture after an `UnreadableImage` error.

    Raises:
        UnreadableImage: the picture is too small or too large for the network or the memory.
    """
    height, width = images.shape[2:]
    if min(height, width) < model.smallest_side:
        given = f"{width} x {height} pixels"
        needed = f"each side needs at least {model.f} pixels"
        raise UnreadableImage(str(path), f"{given} are too small: {needed}")
    try:
        return model.reconstruct(images)
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = f"no memory for {width} x {height} pixels: give max_side or strips"
        raise UnreadableImage(str(path), reason) from error
    # torch has no error class of its own for inputs that a network cannot compute, such as a group
    # norm of a single value.
    except (ValueError, RuntimeError) as error:
        reason = f"{width} x {height} pixels cannot be reconstructed: {first_line(error)}"
        raise UnreadableImage(str(path), reason) from error


def _open_file(path: Path, _: int) -> IO[bytes]:
    return path.open("rb")


def _find_files(inputs: Sequence[str | Path], *, out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each image file, and its path relative to the folder in `inputs` that contains it.

    For a file that is an entry of `inputs`, the relative path is the name of the file. Files of a
    folder that lie in `out` are left out, because an earlier call may have written them.
    """
    for given in map(Path, inputs):
        if given.is_dir():
            names = [Path(name) for name in ImageFolder(given).names]
            written = out.resolve()
            yield from (
                (given / name, name)
                for name in names
                if not (given / name).resolve().is_relative_to(written)
            )
        elif given.exists():
            if is_tiff(given.name):  # prints a line if the file has several pages
                opened = partial(_open_file, given)
                find_pages([given.name], opened, all_pages=False, place=str(given.parent))
            yield given, Path(given.name)
        else:
            siblings = given.parent.iterdir() if given.parent.is_dir() else ()
            hint = nearest(given.name, (sibling.name for sibling in siblings))
            raise UserError(f"there is no image or folder '{given}'{hint}")


def _name_pictures(files: Iterable[tuple[Path, Path]]) -> Iterator[tuple[Path, str]]:
    """Yield each file and the name of its PNG. A name that is already taken gets a number."""
    taken: set[str] = set()
    for path, below in files:
        name, number = below.with_suffix(".png"), 1
        while name.as_posix() in taken:
            number += 1
            name = below.with_name(f"{below.stem}-{number}.png")
        taken.add(name.as_posix())
        yield path, name.as_posix()


def _keep_inputs(targets: Sequence[tuple[Path, str]], out: Path) -> None:
    given = {_identity(path) for path, _ in targets} - {None}
    for _, picture in targets:
        if _identity(out / picture) in given:
            raise UserError(
                f"'{out / picture}' is an input file and would be overwritten: give another "
                "folder for out"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the numbers that identify a file, or None if the file does not exist.

    Names do not identify files, because some file systems treat .PNG as .png.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _shrink(image: Picture, max_side: int | None) -> Picture:
    if max_side is None or max(image.size) <= max_side:
        return image
    scale = max_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _save(path: Path, images: Tensor, recon: Tensor, *, deep: bool) -> None:
    """Write a PNG of original, reconstruction and difference. Mid-grey means no difference."""
    visible = recon - images
    if images.shape[1] == 4:  # the difference on a mid-grey background, without transparency
        opaque = torch.full_like(images[:, 3:], 2 / DIFFERENCE_GAIN)
        visible = torch.cat([to_rgb(recon) - to_rgb(images), opaque], dim=1)
    difference = (DIFFERENCE_GAIN / 2 * visible).clamp(-1.0, 1.0)
    gap = torch.ones_like(images[..., :1]).expand(-1, -1, -1, GAP)
    sheet = torch.cat([images, gap, recon, gap, difference], dim=-1)
    path.parent.mkdir(parents=True, exist_ok=True)
    if deep and images.shape[1] == 1:
        Image.fromarray(to_uint16(sheet)[0, ..., 0]).save(path)
    else:
        to_pil(sheet)[0].save(path)


def _measure(
    images: Tensor, recon: Tensor, *, lpips: PerceptualLoss, image: str, picture: str
) -> Row:
    height, width = images.shape[2:]

    def value(metric: Callable[[Tensor, Tensor], Tensor], minimum: int) -> float | None:
        return metric(images, recon).item() if min(height, width) >= minimum else None

    with torch.inference_mode():
        return Row(
            image=image,
            width=width,
            height=height,
            psnr=psnr(images, recon).item(),
            ssim=value(ssim, SSIM_MIN_SIZE),
            lpips_alex=value(lpips, MIN_SIZE["alex"]),
            picture=picture,
        )


def _title(model: Autoencoder) -> str:
    optimization = model.optimization
    stock = optimization.mode == "stock" and not optimization.why
    return model.name if stock else f"{model.name}: {optimization}"


def _finish(
    rows: Sequence[Row], left_out: Sequence[tuple[str, str]], *, out: Path, name: str
) -> None:
    console = Console()
    for path, reason in left_out:
        text = printable(f"left out {path}: {reason}")
        console.print(text, style="yellow", markup=False, soft_wrap=True)
    if not rows:
        raise UserError(f"none of the {len(left_out)} pictures could be reconstructed")

    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) | _names(row) for row in rows)

    console.print(_table(rows, name))
    others = f", {len(left_out)} left out" if left_out else ""
    text = f"{len(rows)} pictures and table.csv in {out}{others}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _names(row: Row) -> dict[str, str]:
    return {name: spreadsheet_text(getattr(row, name)) for name in ("image", "picture")}


def _table(rows: Sequence[Row], name: str) -> Table:
    table = Table("image", "size", "PSNR dB", "SSIM", "LPIPS alex", title=name)
    for row in rows:
        text = printable(row.image)
        if len(text) > NAME_WIDTH:  # the end of a path tells images apart
            text = "..." + text[3 - NAME_WIDTH :]
        table.add_row(Text(text), f"{row.width} x {row.height}", *_cells([row]))
    table.add_section()
    table.add_row(f"mean of {len(rows)}", "", *_cells(rows))
    return table


def _cells(rows: Sequence[Row]) -> list[str]:
    columns = [
        ([row.psnr for row in rows], ".2f"),
        ([row.ssim for row in rows], ".4f"),
        ([row.lpips_alex for row in rows], ".4f"),
    ]
    return [_mean(values, digits) for values, digits in columns]


def _mean(values: Iterable[float | None], digits: str) -> str:
    """Return the mean of all values except None as text, or "n/a" if all values are None.

    If one value is infinite, the mean is infinite.
    """
    known = [value for value in values if value is not None]
    if not known:
        return "n/a"
    mean = math.inf if math.inf in known else statistics.fmean(known)
    return format(mean, digits)
