"""Fit a detector on a folder of clean images, and score other images with it."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from latentvae.anomaly.checks import check_choice, check_range, warn_if_rate_is_unreachable
from latentvae.anomaly.detector import clean_threshold
from latentvae.anomaly.image_methods import (
    LEARN_NOTHING,
    METHODS,
    ImageMethod,
    ImageOptions,
    Scored,
    images_of,
)
from latentvae.anomaly.image_sheet import colour_scale, heat_sample, sheet, write_heat_map
from latentvae.anomaly.results import Results, check_both_classes, held_out
from latentvae.anomaly.table_runs import RUN_FORMAT, read_run, write_run
from latentvae.autoencoder import Autoencoder, load
from latentvae.data import EvalTransform, ImageFolder, PixelFormat, UnreadableImage
from latentvae.errors import UserError

TENSORS_NAME = "images.safetensors"
BATCH = 16
DEFAULT_SIDE = 128  # px


class Pictures:
    """Reads the images of a folder in batches for an autoencoder. Damaged files are left out.

    Args:
        folder: folder of images.
        model: the autoencoder, which decides the number of channels.
        resolution: side in pixels, a multiple of the downsampling factor.
    """

    def __init__(self, folder: Path, model: Autoencoder, resolution: int) -> None:
        if resolution < model.f or resolution % model.f:
            raise UserError(
                f"resolution must be a multiple of {model.f}, the downsampling factor of "
                f"'{model.name}' (got {resolution})."
            )
        channels, about = model.image_channels, images_of(model)
        deep = channels != 3 or about.value_range is not None
        pixels = PixelFormat(channels, about.value_range, keep_depth=deep)
        self.source = ImageFolder(folder, pixels=pixels)
        self.transform = EvalTransform(resolution, interpolation=about.image_interpolation_mode)
        self.left_out: list[str] = []

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[list[str], Tensor]]:
        """Yield names and images, (B, C, R, R) in [-1, 1], where R is the resolution."""
        names: list[str] = []
        images: list[Tensor] = []
        for index in tqdm(indices, unit="image", leave=False):
            try:
                images.append(self.transform(self.source.read(index)))
                names.append(self.source.name(index))
            except UnreadableImage as error:
                self.left_out.append(str(error))
                tqdm.write(f"left out: {error}")
            if len(images) == BATCH:
                yield names, torch.stack(images)
                names, images = [], []
        if images:
            yield names, torch.stack(images)


def fit_images(
    data: Path,
    out: Path,
    *,
    model: str,
    method: str = "positions",
    resolution: int | None = None,
    options: ImageOptions | None = None,
    held_out_share: float = 0.2,
    false_alarm_rate: float = 0.01,
) -> ImageMethod:
    """Fit a detector on clean images, set its threshold on held-out images, and save it.

    Args:
        data: folder of clean images (images without anomalies).
        out: folder for the detector.
        model: folder or Hub id of an autoencoder. The detector stores this name and a hash of the
            weights, but not the weights.
        method: name of the scoring method, a key of `image_methods.METHODS`.
        resolution: side in pixels. By default, the side is the model's image size if the model
            supports only one size, else 128.
        options: options of the method. The option `seed` also decides which images are held out.
        held_out_share: share of the clean images that are used only for the threshold. A method
            that learns nothing uses all clean images for the threshold.
        false_alarm_rate: allowed share of clean images that are flagged as anomalies.

    Raises:
        UserError: the images, the model or an option is wrong.
    """
    check_choice("method", method, tuple(METHODS))
    check_range("false_alarm_rate", false_alarm_rate, low=0, high=0.5, open_low=True)
    network = load(model, device="cuda" if torch.cuda.is_available() else "cpu")
    options = options or ImageOptions()
    side = resolution or network.fixed_size or DEFAULT_SIDE
    pictures = Pictures(data, network, side)
    if method in LEARN_NOTHING:
        train, clean = [], list(range(len(pictures.source)))
    else:
        train, clean = held_out(len(pictures.source), held_out_share, options.seed)

    # fit
    fitted = METHODS[method](options)
    if method not in LEARN_NOTHING:
        found = [network.encode(images).float().cpu() for _, images in pictures.batches(train)]
        fitted.fit(_joined(found, data))

    # threshold
    scored = [fitted.score(network, images) for _, images in pictures.batches(clean)]
    if not scored:
        raise UserError(f"none of the held-out images of '{data}' can be read.")
    scores = torch.cat([part.scores for part in scored]).double().numpy()
    warn_if_rate_is_unreachable(len(scores), false_alarm_rate)
    threshold = -clean_threshold(-scores, false_alarm_rate)

    # save
    out.mkdir(parents=True, exist_ok=True)
    heat = heat_sample(torch.cat([part.maps for part in scored]))
    tensors = {name: value.contiguous() for name, value in fitted.tensors().items()}
    save_file(tensors | {"clean_heat": heat}, out / TENSORS_NAME)
    content = {
        "format": RUN_FORMAT,
        "kind": "image",
        "method": method,
        "model": str(model),
        "weights_sha256": network.info()["weights_sha256"],
        "resolution": side,
        "options": asdict(options),
        "false_alarm_rate": false_alarm_rate,
        "threshold": threshold,
        "training_items": len(train),
        "held_out_items": len(scores),
        "held_out_flagged": int((scores > threshold).sum()),
    }
    write_run(out, content)
    return fitted


def score_images(
    folder: Path,
    data: Path,
    out: Path,
    *,
    normal_folder: str | None = None,
    num_pictures: int = 8,
    heat_maps: bool = False,
) -> Results:
    """Score images, and write a picture of the most anomalous images with heat maps.

    Args:
        folder: folder that `fit_images` wrote.
        data: folder of images.
        out: folder for the pictures.
        normal_folder: name of the folder directly in `data` that holds the normal images. All
            other images in `data` are anomalies. Give None if you do not know which images are
            normal.
        num_pictures: number of images in the picture of the most anomalous images.
        heat_maps: whether to write the heat map of every image too.

    Raises:
        UserError: a folder, the model or an option is wrong.
    """
    run = read_run(folder)
    if run["kind"] != "image":
        raise UserError(f"the detector in '{folder}' is for tables, not for images.")
    check_range("num_pictures", num_pictures, low=1)
    network = _same_model(run, folder)
    try:
        tensors = load_file(folder / TENSORS_NAME)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{folder / TENSORS_NAME}' cannot be read: {error}") from error
    clean_heat = tensors.pop("clean_heat")
    fitted = METHODS[run["method"]](ImageOptions(**run["options"])).restore(tensors)

    # check the labels before any computation
    pictures = Pictures(data, network, run["resolution"])
    if normal_folder is not None:
        check_both_classes(_labels(pictures.source.names, normal_folder, data), f"'{data}'")

    # scores
    names, parts, top = [], [], _Top(num_pictures)
    with _HeatMaps(out / "heat_maps") if heat_maps else nullcontext() as kept:
        for batch_names, images in pictures.batches(range(len(pictures.source))):
            scored = fitted.score(network, images)
            names += batch_names
            parts.append(scored.scores.double())
            top.add(batch_names, images, scored)
            if kept is not None:
                kept.add(batch_names, scored.maps)
        scores = torch.cat(parts).numpy() if parts else np.zeros(0)
        if not len(scores):
            raise UserError(f"none of the images in '{data}' can be read.")

        # pictures, all with one colour scale
        scale = colour_scale(clean_heat, top.maps)
        top.write(out / "most_anomalous.png", scale)
        if kept is not None:
            kept.write(scale)
    labels = None if normal_folder is None else _labels(names, normal_folder, data)
    return Results(names, scores, float(run["threshold"]), labels)


class _Top:
    """The most anomalous images so far. Only these images are kept in memory."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: list[tuple[float, str, Tensor, Tensor]] = []

    def add(self, names: Sequence[str], images: Tensor, scored: Scored) -> None:
        rows = zip(scored.scores.tolist(), names, images, scored.maps.cpu(), strict=True)
        self.rows = sorted([*self.rows, *rows], key=lambda row: -row[0])[: self.number]

    @property
    def maps(self) -> Tensor:
        """Heat maps of these images, (n, H, W)."""
        return torch.stack([row[3] for row in self.rows])

    def write(self, path: Path, scale: tuple[float, float]) -> None:
        low, high = scale
        texts = [f"{score:.4g}  {name}" for score, name, _, _ in self.rows]
        images = torch.stack([row[2] for row in self.rows])
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(images, self.maps, texts, low=low, high=high).save(path)


class _HeatMaps:
    """The heat maps of all images, in a temporary file until their colour scale is known.

    The temporary file is in the folder of the pictures, because the folder for temporary files of
    many systems is in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.shape = torch.Size()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, names: Sequence[str], maps: Tensor) -> None:
        self.names += names
        self.shape = maps.shape[1:]
        try:
            self.file.write(maps.float().cpu().numpy().tobytes())
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write the heat maps to '{self.folder}': {error.strerror}."
            ) from error

    def write(self, scale: tuple[float, float]) -> None:
        self.file.seek(0)
        for name in self.names:
            content = bytearray(self.file.read(4 * self.shape.numel()))
            heat = torch.frombuffer(content, dtype=torch.float32).view(self.shape)
            write_heat_map(self.folder / f"{name}.png", heat, low=scale[0], high=scale[1])


def _joined(latents: list[Tensor], data: Path) -> Tensor:
    if not latents:
        raise UserError(f"none of the images in '{data}' can be read.")
    return torch.cat(latents)


def _same_model(run: dict, folder: Path) -> Autoencoder:
    """Load the autoencoder, and check that its weights have not changed since the fit.

    Raises:
        UserError: the autoencoder cannot be loaded, or its weights changed.
    """
    network = load(run["model"], device="cuda" if torch.cuda.is_available() else "cpu")
    if network.info()["weights_sha256"] != run["weights_sha256"]:
        raise UserError(
            f"the weights of '{run['model']}' have changed since the detector in '{folder}' was "
            "fitted. Run the fit again."
        )
    return network


def _labels(names: Sequence[str], normal_folder: str, data: Path) -> np.ndarray:
    """Return 0 for images in the normal folder and 1 for all other images."""
    labels = np.array([0 if name.split("/")[0] == normal_folder else 1 for name in names])
    if not (labels == 0).any():
        raise UserError(f"'{data}' has no folder '{normal_folder}' of normal images.")
    return labels
