"""Places where a file of a user's, or of a stranger's, is read.

A place is how to make a folder with a good file in it, and the call that reads that file. Images
in folders, archives and tables have more forms than files: see test_hostile_images.py.
"""

import csv
import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

import latentvae
from latentvae.autoencoder import Autoencoder
from latentvae.data import DatasetSpec, HubImages, PixelFormat, TarShards, read_image
from latentvae.data.sizes import read_size
from latentvae.engine.checkpoint_files import Snapshot, load_checkpoint, save_checkpoint
from latentvae.engine.log import read_rows
from latentvae.engine.resume import read_config, write_config
from latentvae.evaluation.measures import PooledError
from latentvae.evaluation.saved_progress import Progress
from latentvae.latents.decode import decode_folder
from latentvae.latents.encode import encode_folder
from latentvae.losses.lpips_weights import find_trunk, installed_trunk, read_trunk
from latentvae.metrics.inception import load_inception
from latentvae.report import Report, compare
from latentvae.tasks.autoencoder.config import TrainConfig, load_preset
from latentvae.tasks.autoencoder.fine_tuning import Base, read_base
from tests.data.conftest import parquet, picture, tar
from tests.models.test_single_file import network, original
from tests.tasks.autoencoder.small import small_config
from tests.tiny import BLOCKS, spread_vq, tokenizer


@dataclass(frozen=True)
class Place:
    """A file that is read.

    Args:
        make: fills an empty folder.
        file: in that folder, which is damaged.
        read: reads it, given the folder; raises UserError alone.
        text: whether it is JSON or YAML.
        flip: whether a flipped bit in its middle is noticed. Weights and texts hold no checksum of
            their own.
        optional: whether the reader starts from nothing where there is no file.
        lenient: whether it passes over whatever it cannot read, as of a cache or a log.
        may_read: kinds of wrong bytes that are still a file of this kind.
        made_good: whether `make` makes a file that is read.
    """

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], object]
    text: Literal["json", "yaml", ""] = ""
    flip: Literal["noticed", "unnoticed"] = "unnoticed"
    optional: bool = False
    lenient: bool = False
    may_read: frozenset[str] = frozenset()
    made_good: bool = True


def kl(*, seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(**BLOCKS, latent_channels=4)


def _png() -> bytes:
    file = io.BytesIO()
    picture(24, 20).save(file, "PNG")
    return file.getvalue()


def _preset(folder: Path) -> None:
    (folder / "my.yaml").write_text(
        "run: {seed: 3}\nmodel: {block_out_channels: [8, 8, 16], norm_num_groups: 4}\n"
    )


def _run(folder: Path) -> None:
    write_config(small_config(folder), folder / "config.yaml")


def _checkpoint(folder: Path) -> None:
    tensors = {"model": {"w": torch.arange(600.0)}, "optimizer": {"w|step": torch.ones(())}}
    save_checkpoint(folder, Snapshot(tensors, {"update": 2}), update=2, keep=1)


def _checkpoint_of(folder: Path) -> object:
    return load_checkpoint(folder / "checkpoint-2")


def _log(folder: Path) -> None:
    rows = [{"update": n, "loss/rec": 0.5} for n in range(1, 5)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _trunk(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        names = [f"features.{i}.{kind}" for i in (0, 3, 6, 8, 10) for kind in ("weight", "bias")]
        state = {name: torch.ones(64) for name in names}
        if name.endswith(".pth"):
            torch.save(state, folder / name)
        elif name.endswith(".safetensors"):
            from safetensors.torch import save_file

            save_file(state, folder / name)
        else:
            path = installed_trunk("alex")
            assert path is not None
            (folder / name).write_bytes(path.read_bytes())

    return make


def _trunk_of(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        path = find_trunk("alex", weights=folder / name, allow_download=False)
        return read_trunk(path, "alex")

    return read


def _single(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(original(network()), folder / "vae.safetensors")


def _shards(folder: Path) -> None:
    (folder / "photos").mkdir()
    for number in range(3):
        picture(20, 18, seed=number).save(folder / "photos" / f"{number}.png")
    encode_folder(_model(), folder / "photos", folder / "shards", resolution=16)


def _shards_of(folder: Path) -> object:
    reader = latentvae.TokenDataset(folder / "shards").reader
    reader.verify()
    reader.check()
    return reader.names(), [reader.payload(n).tolist() for n in range(len(reader))]


def _decoded(folder: Path) -> None:
    _shards(folder)
    _decoded_of(folder)


def _decoded_of(folder: Path) -> object:
    return decode_folder(folder / "shards", folder / "out", model=_model())


@functools.cache
def _model() -> Autoencoder:
    return Autoencoder(spread_vq(40), name="model")


def _report(folder: Path) -> None:
    protocol = {"size": "own", "lpips": {"alex": "1"}, "distribution": {}}
    mean = {"mean": 30.0, "ci95": (29.0, 31.0), "images": 2}
    values = {
        "protocol": protocol,
        "data": {"num_images": 2, "pixels_sha256_sum": "ab"},
        "models": {"a": {"metrics": {"psnr": mean}, "rate": {"raw_bpp": 1.0}}},
        "codecs": {"jpeg": [{"bpp": 1.0, "psnr": 30.0, "quality": 30}]},
    }
    for name in ("a", "b"):
        (folder / name).mkdir()
        Report.model_validate(values).write(folder / name / "report.json")


def _progress(folder: Path) -> None:
    with (folder / "per_image.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image"], ["a"]])
    size = (folder / "per_image.csv").stat().st_size
    error = PooledError()
    error.update(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2))
    Progress(folder, {"data": "x"}).save(1, {"csv_bytes": size}, {"error": error})


def _progress_of(folder: Path) -> object:
    progress, error = Progress(folder, {"data": "x"}), PooledError()
    if progress.done:
        progress.restore({"error": error})
    return progress.done, progress.values, error.squares


def _tar(folder: Path) -> None:
    tar(folder / "x.tar", {f"{n}.png": _png() for n in range(3)})


def _tar_of(folder: Path) -> object:
    shards = TarShards(folder / "x.tar")
    return [(shards.name(n), shards.read(n).size) for n in range(len(shards))]


def _indexed(folder: Path) -> None:
    _tar(folder)
    _tar_of(folder)


def _table(folder: Path) -> None:
    parquet(folder / "x.parquet", [{"bytes": _png(), "path": f"{n}.png"} for n in range(3)])


def _rows(path: Path) -> object:
    images = HubImages(DatasetSpec(name=str(path), cache_dir=str(path.parent / "cache")))
    return [(images.name(n), images.read(n).size) for n in range(len(images))]


def _arrow(folder: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = {"image": [{"bytes": _png(), "path": f"{n}.png"} for n in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")


def _image(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path, values = folder / name, np.arange(20 * 24 * 3).reshape(20, 24, 3)
        if name.endswith(".npy"):
            np.save(path, values.astype(np.uint16))
        elif name.startswith("deep"):
            import tifffile

            tifffile.imwrite(path, values.astype(np.uint16), photometric="rgb")
        else:
            Image.fromarray(values.astype(np.uint8)).save(path)

    return make


def _image_of(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        read_size(folder / name, name=name)
        return np.asarray(read_image(folder / name, pixels=PixelFormat(3)))

    return read


def _images() -> dict[str, Place]:
    flips = {"photo.png": "noticed"}  # a checksum in each chunk
    names = ("photo.png", "photo.jpg", "photo.tif", "photo.webp", "deep.tif", "array.npy")
    return {
        f"image {name}": Place(
            _image(name),
            name,
            _image_of(name),
            flip="noticed" if name in flips else "unnoticed",
            may_read=frozenset({"cut at 99 %"}),  # the end mark alone
        )
        for name in names
    }


PLACES: dict[str, Place] = {
    "preset": Place(
        _preset,
        "my.yaml",
        lambda f: load_preset(str(f / "my.yaml")),
        "yaml",
        may_read=frozenset({"empty", "cut at 50 %", "cut at 99 %"}),
    ),
    "config of a run": Place(
        _run,
        "config.yaml",
        lambda f: read_config(f / "config.yaml", TrainConfig),
        "yaml",
        may_read=frozenset({"cut at 99 %"}),  # its last option, with which it ends, is then shorter
    ),
    "base of a run": Place(
        lambda f: Base("base", kl(), "ab", "cd", whole=True).write(f),
        "base.json",
        lambda f: read_base(f, "kl"),
        "json",
        optional=True,
    ),
    "log of a run": Place(
        _log,
        "log.jsonl",
        lambda f: read_rows(f / "log.jsonl"),
        lenient=True,
    ),
    "checkpoint manifest": Place(
        _checkpoint, "checkpoint-2/manifest.json", _checkpoint_of, "json", flip="noticed"
    ),
    "checkpoint state": Place(
        _checkpoint, "checkpoint-2/state.json", _checkpoint_of, "json", flip="noticed"
    ),
    "checkpoint weights": Place(
        _checkpoint, "checkpoint-2/model.safetensors", _checkpoint_of, flip="noticed"
    ),
    "export config": Place(
        lambda f: kl().save_pretrained(f), "config.json", lambda f: latentvae.load(f), "json"
    ),
    "export weights": Place(
        lambda f: kl().save_pretrained(f),
        "diffusion_pytorch_model.safetensors",
        lambda f: latentvae.load(f),
    ),
    "tokenizer config": Place(
        lambda f: tokenizer("fsq").save_pretrained(f),
        "config.json",
        lambda f: latentvae.load(f),
        "json",
    ),
    "single file": Place(
        _single, "vae.safetensors", lambda f: latentvae.load(f / "vae.safetensors", family="sd")
    ),
    "LPIPS .pth": Place(_trunk("t.pth"), "t.pth", _trunk_of("t.pth")),
    "LPIPS .safetensors": Place(
        _trunk("t.safetensors"), "t.safetensors", _trunk_of("t.safetensors")
    ),
    "LPIPS .ckpt": Place(_trunk("t.ckpt"), "t.ckpt", _trunk_of("t.ckpt"), flip="noticed"),
    "Inception": Place(
        lambda f: (f / "i.pth").write_bytes(bytes(900)),
        "i.pth",
        lambda f: load_inception(f / "i.pth"),
        flip="noticed",
        made_good=False,  # 91 MB that no test may download
    ),
    "shard manifest": Place(_shards, "shards/manifest.json", _shards_of, "json"),
    "shard": Place(_shards, "shards/shard-00000.safetensors", _shards_of, flip="noticed"),
    "shard table": Place(_shards, "shards/shard-00000.parquet", _shards_of, flip="noticed"),
    "record of decoding": Place(_decoded, "out/decoded.json", _decoded_of, "json", optional=True),
    "report": Place(_report, "a/report.json", lambda f: compare([f / "a", f / "b"]), "json"),
    "state of an evaluation": Place(
        _progress, ".progress/state.json", _progress_of, "json", optional=True
    ),
    "sums of an evaluation": Place(_progress, ".progress/1.npz", _progress_of, flip="noticed"),
    "tar": Place(_tar, "x.tar", _tar_of, may_read=frozenset({"cut at 50 %", "cut at 99 %"})),
    "tar index": Place(_indexed, ".x.tar.index.npz", _tar_of, lenient=True),
    "parquet": Place(_table, "x.parquet", lambda f: _rows(f / "x.parquet")),
    "saved data set": Place(
        _arrow, "saved/data-00000-of-00001.arrow", lambda f: _rows(f / "saved")
    ),
    "saved data set's state": Place(
        _arrow,
        "saved/state.json",
        lambda f: _rows(f / "saved"),
        "json",
        optional=True,  # the arrow files are then read as such
    ),
    "saved data set's info": Place(
        _arrow,
        "saved/dataset_info.json",
        lambda f: _rows(f / "saved"),
        "json",
        lenient=True,  # the arrow file says it too
    ),
} | _images()


def values_of(place: Place, folder: Path) -> Any:
    """What a JSON or YAML file says."""
    import yaml

    text = (folder / place.file).read_text()
    return json.loads(text) if place.text == "json" else yaml.safe_load(text)
