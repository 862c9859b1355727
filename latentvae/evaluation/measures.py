"""Measure the pictures that models and codecs reconstruct, and average the metrics.

`B` batch, `C` channels, `H W` pixels, `d` latent channels, `h w` latent positions.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentvae.evaluation.saved_progress import Arrays
from latentvae.losses.perceptual import MIN_SIZE, PerceptualLoss
from latentvae.metrics import psnr
from latentvae.metrics.bootstrap import BootstrapMean
from latentvae.metrics.distribution import trunk_features
from latentvae.metrics.table import IMAGE_METRICS
from latentvae.report.schema import IMAGE_COLUMNS, Mean
from latentvae.text import spreadsheet_text

BATCH_PIXELS = 2**19  # pixels in a forward pass. More pixels need more memory but save no time.


@dataclass(frozen=True)
class Row:
    """The rate and the metrics of one coder (a model or a codec) on one picture.

    Args:
        kind: what was measured. `"model"` is a model without entropy coding (`bpp` is the raw
            rate). `"bitstream"` is a model whose latent or tokens are coded in a file. `"codec"` is
            an image codec. `"codec_at_rate"` is a codec at the quality that reaches a model's raw
            rate.
        setting: the quality of a codec. For the bitstream of a continuous latent, the PSNR in dB of
            the noise that rounding the latent adds to the image. Otherwise None.
        metrics: values of the metrics by name (`IMAGE_COLUMNS`). If a metric was not measured, or
            if the picture is too small for the metric, the value is None or absent.
    """

    image: str
    kind: str
    coder: str
    setting: float | None
    width: int
    height: int
    bpp: float
    metrics: Mapping[str, float | None]

    def value(self, column: str) -> float | None:
        """Return the bits per pixel if `column` is `"bpp"`, else the metric named `column`."""
        return self.bpp if column == "bpp" else self.metrics.get(column)

    def to_dict(self) -> dict[str, Any]:
        """Return the row's values by the names of the CSV file's columns, `CSV_COLUMNS`."""
        values = {name: getattr(self, name) for name in FACTS}
        names = {"image": spreadsheet_text(self.image), "coder": spreadsheet_text(self.coder)}
        return values | names | {name: self.metrics.get(name) for name in IMAGE_COLUMNS}


FACTS = tuple(field.name for field in fields(Row) if field.name != "metrics")
CSV_COLUMNS = (*FACTS, *IMAGE_COLUMNS)


@dataclass(frozen=True)
class Original:
    """An original picture with its features, for the comparison with reconstructions.

    Args:
        position: number of the picture in the evaluation.
        images: (1, 3, H, W) in [-1, 1], rounded to 8 bits.
        levels: features of each layer that LPIPS compares, by backbone.
        inception: Inception features (1, 2048), or None if they are not needed.
    """

    name: str
    position: int
    images: Tensor
    levels: Mapping[str, Sequence[Tensor]]
    inception: Tensor | None

    @property
    def pixels(self) -> int:
        return self.images.shape[2] * self.images.shape[3]


@dataclass(frozen=True)
class Compared:
    """The metrics of a reconstruction, and its D features, (1, D), by feature extractor."""

    metrics: dict[str, float | None]
    features: dict[str, Tensor]


class Judge:
    """Compares reconstructions with originals.

    The features of an original are computed only once, for all its reconstructions.

    Args:
        lpips: perceptual losses by backbone.
        inception: network from images (B, 3, H, W) in [-1, 1] to features (B, 2048), or None.
    """

    def __init__(self, lpips: Mapping[str, PerceptualLoss], inception: Any | None = None) -> None:
        self.lpips, self.inception = dict(lpips), inception

    @property
    def extractors(self) -> dict[str, int]:
        """Number of features by feature extractor, for the distances between sets of images."""
        vgg = {"vgg": 512} if "vgg" in self.lpips else {}
        return vgg | ({"inception": 2048} if self.inception is not None else {})

    def original(self, name: str, position: int, images: Tensor) -> Original:
        size = min(images.shape[2:])
        levels = {n: p.features(images) for n, p in self.lpips.items() if size >= MIN_SIZE[n]}
        inception = None if self.inception is None else self.inception.features(images)
        return Original(name, position, images, levels, inception)

    def features_of(self, original: Original) -> dict[str, Tensor]:
        """Return an original's features by extractor, as in `Compared`."""
        return _features(original.levels, original.inception)

    def compare(
        self, original: Original, recon: Tensor, *, nets: Collection[str] | None = None
    ) -> Compared:
        """Return metrics and features of `recon`, which is (1, 3, H, W) and rounded to 8 bits.

        Args:
            nets: backbones of LPIPS to use. If backbones are given, the Inception features are left
                out. None uses all backbones and Inception.
        """
        images, size = original.images, min(original.images.shape[2:])
        chosen = [net for net in original.levels if nets is None or net in nets]
        levels = {net: self.lpips[net].features(recon) for net in chosen}
        metrics = {
            **{
                name: _item(metric.measure(images, recon)) if size >= metric.min_size else None
                for name, metric in IMAGE_METRICS.items()
            },
            **{f"lpips_{net}": self._lpips(original, net, value) for net, value in levels.items()},
        }
        extractor = self.inception if nets is None else None
        inception = None if extractor is None else extractor.features(recon)
        return Compared(metrics, _features(levels, inception))

    def compare_points(
        self, original: Original, recons: Sequence[Tensor]
    ) -> list[dict[str, float]]:
        """Return only PSNR and LPIPS (alex) of each picture (1, 3, H, W), for rate curves.

        LPIPS processes several small pictures in one batch. LPIPS is left out if `original` has no
        features of the backbone alex, for example because the picture is too small.
        """
        found = [{"psnr": psnr(original.images, recon).item()} for recon in recons]
        if "alex" not in original.levels:
            return found
        count = max(1, BATCH_PIXELS // original.pixels)
        for start in range(0, len(recons), count):
            levels = self.lpips["alex"].features(torch.cat([*recons[start : start + count]]))
            distances = self.lpips["alex"].distance(original.levels["alex"], levels).tolist()
            for metrics, distance in zip(found[start : start + count], distances, strict=True):
                metrics["lpips_alex"] = distance
        return found

    def _lpips(self, original: Original, net: str, levels: Sequence[Tensor]) -> float:
        return self.lpips[net].distance(original.levels[net], levels).item()


def row(
    original: Original,
    kind: str,
    coder: str,
    *,
    bpp: float,
    setting: float | None = None,
    **metrics: Any,
) -> Row:
    """Return the `Row` of a coder on the picture `original`, with `metrics` by name."""
    height, width = original.images.shape[2:]
    return Row(
        image=original.name,
        kind=kind,
        coder=coder,
        setting=setting,
        width=width,
        height=height,
        bpp=bpp,
        metrics=metrics,
    )


class Means:
    """Averages rate and metrics of `Row` over images, by kind, setting, and model or codec."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, str, float | None, str], BootstrapMean] = {}

    def update(self, rows: Sequence[Row], *, position: int) -> None:
        for entry in rows:
            for column in ("bpp", *IMAGE_COLUMNS):
                if (value := entry.value(column)) is not None:
                    key = (entry.kind, entry.coder, entry.setting, column)
                    self._means.setdefault(key, BootstrapMean()).update(value, index=position)

    def mean(self, kind: str, coder: str, column: str, *, setting: float | None = None) -> Any:
        """Return a column's mean over images as a `schema.Mean`, or None if there are no values."""
        found = self._means.get((kind, coder, setting, column))
        return None if found is None else Mean.model_validate(found.result())

    def state_dict(self) -> Arrays:
        keys = json.dumps(list(self._means)).encode()
        arrays = {"keys": np.frombuffer(keys, dtype=np.uint8)}
        for number, mean in enumerate(self._means.values()):
            arrays |= {f"{number}.{key}": value for key, value in mean.state_dict().items()}
        return arrays

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        self._means = {}
        for number, key in enumerate(json.loads(state["keys"].tobytes())):
            prefix, mean = f"{number}.", BootstrapMean()
            mean.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
            self._means[tuple(key)] = mean


class PooledError:
    """Computes one PSNR from the mean squared error of all images. Pixels are in [-1, 1]."""

    def __init__(self) -> None:
        self.squares, self.elements = 0.0, 0

    def update(self, images: Tensor, recon: Tensor) -> None:
        self.squares += (images - recon).cpu().double().square().sum().item()
        self.elements += images.numel()

    @property
    def psnr(self) -> float:
        return 10 * math.log10(4 * self.elements / self.squares) if self.squares else math.inf

    def state_dict(self) -> Arrays:
        return {"squares": np.array(self.squares), "elements": np.array(self.elements)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        self.squares, self.elements = float(state["squares"]), int(state["elements"])


def _features(
    levels: Mapping[str, Sequence[Tensor]], inception: Tensor | None
) -> dict[str, Tensor]:
    vgg = {"vgg": trunk_features(levels["vgg"])} if "vgg" in levels else {}
    return vgg | ({} if inception is None else {"inception": inception})


def _item(value: Tensor | None) -> float | None:
    return None if value is None else value.item()
