"""Measure models and image codecs on the same pictures, under one stated protocol.

Each picture is brought to the protocol's size, coded and rebuilt by every model and codec, rounded
to 8 bits, and compared with the original. One picture is in memory at a time; what is kept of it is
a few numbers for each model and each quality of each codec.

    lpips = {"alex": PerceptualLoss(load_lpips("alex"))}
    report = measure({"mine": model}, images, lpips=lpips)  # images: (name, PIL picture) pairs
"""

import math
import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from latentvae.data import EvalTransform, to_tensor
from latentvae.errors import UserError
from latentvae.losses.perceptual import MIN_SIZE, PerceptualLoss, weights_id
from latentvae.metrics import mean_and_ci95, ms_ssim, psnr, ssim, to_8bit
from latentvae.metrics.image import SSIM_MIN_SIZE
from latentvae.report.codecs import CODECS, Codec, bits_per_pixel
from latentvae.report.schema import Mean, Metrics, ModelReport, Point, Rate, Report

LATENT_BITS = 16  # bits of one latent element in `raw_bpp`: float16 or bfloat16
EXACT_PSNR = 100.0  # dB; where larger (an exact copy has infinity), so that means stay finite

METRICS = ("psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg")


class Reconstructor(Protocol):
    """What is asked of a model: images of any size back at that size, and its latent's shape."""

    @property
    def f(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    def reconstruct(self, images: Tensor, /) -> Any: ...

    def info(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Row:
    """One picture through one coder. A metric that its size does not allow is None."""

    image: str
    kind: str  # "model" or "codec"
    coder: str
    quality: int | None
    width: int
    height: int
    bpp: float
    psnr: float
    ssim: float | None = None
    ms_ssim: float | None = None
    lpips_alex: float | None = None
    lpips_vgg: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Original:
    """What all coders are compared with: (1, 3, H, W), and LPIPS' features of it by trunk."""

    name: str
    images: Tensor
    features: dict[str, Sequence[Tensor]]


class Evaluation:
    """Takes pictures one by one (`update`) and gives the report of all so far (`report`).

    Args:
        models: By the names that the report will use.
        lpips: `PerceptualLoss` by trunk, `"alex"` and `"vgg"`; a trunk left out is not measured.
        codecs: By name; measured in PSNR and LPIPS (alex) at each of their qualities.
        resolution: Pixels a side (shorter side resized, then centre crop), or None for own size.
        device: Where the models are and the metrics run.
    """

    def __init__(
        self,
        models: Mapping[str, Reconstructor],
        *,
        lpips: Mapping[str, PerceptualLoss],
        codecs: Mapping[str, Codec] = CODECS,
        resolution: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.models, self.codecs, self.resolution = dict(models), dict(codecs), resolution
        self.device = torch.device(device)
        self.lpips = {net: loss.to(self.device) for net, loss in lpips.items()}
        self._columns: dict[tuple[str, int | None, str], array[float]] = defaultdict(_column)
        self._sizes: Counter[str] = Counter()
        self._prepare = to_tensor if resolution is None else EvalTransform(resolution)

    def prepare(self, picture: Image.Image) -> Tensor:
        """The original that everything is compared with: (1, 3, H, W) on the 8-bit grid."""
        return to_8bit(self._prepare(picture.convert("RGB")))[None].to(self.device)

    @torch.no_grad()
    def update(self, name: str, picture: Image.Image) -> list[Row]:
        """Measure one picture with every model and codec."""
        original = self._original(name, self.prepare(picture))
        rows = [self._model_row(original, model) for model in self.models]
        source = to_picture(original.images)
        for codec in self.codecs:
            rows += [self._codec_row(original, source, codec, q) for q in self._qualities(codec)]
        self._sizes[f"{source.width}x{source.height}"] += 1
        for row in rows:
            for column in ("bpp", *METRICS):
                if (value := getattr(row, column)) is not None:
                    self._columns[row.coder, row.quality, column].append(value)
        return rows

    def report(self, *, data: Mapping[str, Any]) -> Report:
        """The means so far; `data` says what the pictures are and is kept as it is."""
        if not self._sizes:
            raise UserError("there is nothing to report: no picture was measured")
        sizes = dict(self._sizes.most_common(10))
        return Report(
            protocol=self._protocol(),
            data={**data, "num_images": self._sizes.total(), "commonest_sizes": sizes},
            models={name: self._model_report(name) for name in self.models},
            codecs={name: self._curve(name) for name in self.codecs},
        )

    def _qualities(self, codec: str) -> tuple[int, ...]:
        return self.codecs[codec].qualities

    def _original(self, name: str, images: Tensor) -> _Original:
        size = min(images.shape[2:])
        nets = {net: loss for net, loss in self.lpips.items() if size >= MIN_SIZE[net]}
        return _Original(name, images, {net: loss.features(images) for net, loss in nets.items()})

    def _model_row(self, original: _Original, coder: str) -> Row:
        model, images = self.models[coder], original.images
        recon = to_8bit(model.reconstruct(images))
        assert recon.shape == images.shape, (coder, recon.shape, images.shape)
        height, width = images.shape[2:]
        return Row(
            image=original.name,
            kind="model",
            coder=coder,
            quality=None,
            width=width,
            height=height,
            bpp=raw_bpp(model, height, width),
            ssim=_item(ssim(images, recon)) if min(height, width) >= SSIM_MIN_SIZE else None,
            ms_ssim=_item(ms_ssim(images, recon)),
            **self._distances(original, recon, nets=tuple(self.lpips)),
        )

    def _codec_row(self, original: _Original, source: Image.Image, coder: str, quality: int) -> Row:
        codec = self.codecs[coder]
        content = codec.encode(source, quality=quality)
        recon = to_tensor(codec.decode(content))[None].to(self.device)
        return Row(
            image=original.name,
            kind="codec",
            coder=coder,
            quality=quality,
            width=source.width,
            height=source.height,
            bpp=bits_per_pixel(content, source),
            **self._distances(original, recon, nets=("alex",)),
        )

    def _distances(
        self, original: _Original, recon: Tensor, *, nets: Sequence[str]
    ) -> dict[str, float]:
        """PSNR and LPIPS, under the names of `Row`."""
        found = {"psnr": min(psnr(original.images, recon).item(), EXACT_PSNR)}
        for net in original.features.keys() & nets:
            loss = self.lpips[net]
            distance = loss.distance(original.features[net], loss.features(recon))
            found[f"lpips_{net}"] = distance.item()
        return found

    def _model_report(self, name: str) -> ModelReport:
        columns = {metric: self._columns[name, None, metric] for metric in METRICS}
        means = {m: Mean.model_validate(mean_and_ci95(v)) for m, v in columns.items() if v}
        return ModelReport(
            metrics=Metrics(**means),
            rate=Rate(raw_bpp=statistics.fmean(self._columns[name, None, "bpp"])),
            info=self.models[name].info(),
        )

    def _curve(self, name: str) -> list[Point]:
        return [self._point(name, quality) for quality in self._qualities(name)]

    def _point(self, codec: str, quality: int) -> Point:
        columns = {m: self._columns[codec, quality, m] for m in ("bpp", "psnr", "lpips_alex")}
        return Point(quality=quality, **{m: statistics.fmean(v) for m, v in columns.items() if v})

    def _protocol(self) -> dict[str, Any]:
        size = "own size, padded to a multiple of f inside the model and cropped back"
        if self.resolution is not None:
            size = f"shorter side resized to {self.resolution} (Lanczos), then centre crop"
        return {
            "size": size,
            "rounding": "originals and reconstructions are rounded to 8 bits before any metric",
            "means": "over images; 95 % interval by bootstrap over images, 2000 resamples, seed 0",
            "psnr": f"dB, RGB, peak 255, per image; at most {EXACT_PSNR:.0f} (an exact copy)",
            "ssim": "per channel, Gaussian window sigma 1.5, 11 x 11 pixels, valid positions",
            "ms_ssim": "as ssim, five scales; not measured below 161 pixels a side",
            "lpips": {net: f"0.1, weights {weights_id(m.lpips)}" for net, m in self.lpips.items()},
            "raw_bpp": f"latent elements x {LATENT_BITS} bits / pixels; no entropy coding",
            "bpp": "bits of the whole file / pixels, per image",
            "codecs": {name: codec.describe() for name, codec in self.codecs.items()},
            "versions": {p: version(p) for p in ("torch", "torchmetrics", "lpips", "pillow")},
            "device": str(self.device),
        }


def measure(
    models: Mapping[str, Reconstructor],
    images: Iterable[tuple[str, Image.Image]],
    *,
    lpips: Mapping[str, PerceptualLoss],
    codecs: Mapping[str, Codec] = CODECS,
    resolution: int | None = None,
    device: torch.device | str = "cpu",
    data: Mapping[str, Any] | None = None,
    on_rows: Callable[[list[Row]], None] | None = None,
) -> Report:
    """Measure all pictures; `on_rows` is called with the rows of each (see `Evaluation`)."""
    evaluation = Evaluation(
        models, lpips=lpips, codecs=codecs, resolution=resolution, device=device
    )
    for name, picture in images:
        rows = evaluation.update(name, picture)
        if on_rows is not None:
            on_rows(rows)
    return evaluation.report(data=data or {})


def raw_bpp(model: Reconstructor, height: int, width: int) -> float:
    """Bits of the latent of one (padded) image over the image's pixels."""
    elements = model.latent_channels * math.ceil(height / model.f) * math.ceil(width / model.f)
    return elements * LATENT_BITS / (height * width)


def to_picture(images: Tensor) -> Image.Image:
    """(1, 3, H, W) in [-1, 1] to an 8-bit picture."""
    levels = ((to_8bit(images)[0] + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _item(value: Tensor | None) -> float | None:
    return None if value is None else value.item()


def _column() -> "array[float]":
    return array("d")
