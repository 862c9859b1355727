"""Compute rate curves of models and codecs (quality over bits per pixel), and their BD-rates.

A BD-rate is the mean difference in bits between two curves at equal quality, in percent.

A point of a curve is the mean rate and the mean quality over the same images. An exact copy has an
infinite PSNR, and a small image has no LPIPS. So an image counts for the curves of a metric only if
every coder (model or codec) that encodes this image has a finite value of the metric at every
setting.
"""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from latentvae.evaluation.measures import Means, Row
from latentvae.evaluation.saved_progress import Arrays
from latentvae.metrics.rate import bd_rate
from latentvae.report.schema import BDRate, CurvePoint, Metric, Point

ANCHOR = "jpeg"  # the codec with which BD-rates compare
SIGNS: dict[Metric, int] = {"psnr": 1, "lpips_alex": -1}  # lower LPIPS is better

Key = tuple[str, str, float | None, str]  # kind, coder, setting, metric


class Curves:
    """Accumulates the points of all rate curves, one image after another.

    For each point and metric, the class counts the images, and sums their bits per pixel and their
    values of the metric.
    """

    def __init__(self) -> None:
        self._sums: dict[Key, np.ndarray] = {}

    def update(self, rows: Sequence[Row]) -> None:
        """Add the results of all models and codecs on one image.

        Rows of the kind `"model"` are left out, because their rate is the size of a latent without
        entropy coding, and curves compare sizes of real files.
        """
        points = [row for row in rows if row.kind != "model"]
        for metric in SIGNS:
            values = [row.value(metric) for row in points]
            if any(value is None or math.isinf(value) for value in values):
                continue
            for row, value in zip(points, values, strict=True):
                key = (row.kind, row.coder, row.setting, metric)
                sums = self._sums.setdefault(key, np.zeros(3))
                sums += (1, row.bpp, value)

    def points(
        self, kind: str, coder: str, settings: Sequence[float | None], *, means: Means
    ) -> list[Point]:
        """Return the points of the rate curve of a model or codec, one for each of `settings`.

        A setting of a codec is its quality. A setting of a model is the PSNR in dB of the noise
        that rounding the latent adds to the image, or None for tokens. A setting at which no image
        was measured is left out. The means in a point's field `curves` are over the images for
        which all models and codecs that encode the image have a finite value of the metric at every
        setting. A point's other means are over all images with a finite value.
        """
        name = "quality" if kind == "codec" else "noise_psnr"
        points = []
        for setting in settings:
            found = {c: means.mean(kind, coder, c, setting=setting) for c in ("bpp", *SIGNS)}
            if found["bpp"] is None:  # the codec's format cannot hold any of the images
                continue
            found = {column: mean for column, mean in found.items() if mean is not None}
            point = {column: mean.mean for column, mean in found.items()} | {name: setting}
            point["images"] = {column: mean.num_values for column, mean in found.items()}
            point["curves"] = self._of(kind, coder, setting)
            points.append(Point.model_validate(point))
        return points

    def _of(self, kind: str, coder: str, setting: float | None) -> dict[Metric, CurvePoint]:
        found: dict[Metric, CurvePoint] = {}
        for metric in SIGNS:
            if (sums := self._sums.get((kind, coder, setting, metric))) is not None:
                images, bpp, value = sums
                found[metric] = CurvePoint(
                    images=int(images), bpp=bpp / images, value=value / images
                )
        return found

    def state_dict(self) -> Arrays:
        keys = json.dumps(list(self._sums)).encode()
        sums = np.array(list(self._sums.values())).reshape(-1, 3)
        return {"keys": np.frombuffer(keys, dtype=np.uint8), "sums": sums}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        keys = [tuple(key) for key in json.loads(state["keys"].tobytes())]
        self._sums = dict(zip(keys, state["sums"], strict=True))


MIN_BD_POINTS = 3  # two points only give a straight line, which may be far from the true curve


def bd_rates(curves: Mapping[str, Sequence[Point]]) -> dict[str, BDRate]:
    """Return every curve's BD-rate: its extra bits at equal quality, in percent of JPEG's bits.

    JPEG itself and curves with fewer than three points have no BD-rate. The result is empty if JPEG
    was not measured.
    """
    if not curves.get(ANCHOR):
        return {}
    return {
        name: BDRate(**{metric: _bd_rate(curves[ANCHOR], points, metric) for metric in SIGNS})
        for name, points in curves.items()
        if name != ANCHOR and len(points) >= MIN_BD_POINTS
    }


def _bd_rate(anchor: Sequence[Point], points: Sequence[Point], metric: Metric) -> float | None:
    """Return the BD-rate, or None if the two curves cannot be compared.

    Two curves cannot be compared if their quality ranges do not overlap, or if they are means over
    different images. For example, the curve of WebP lacks very wide images, because WebP cannot
    store them. A curve also needs two points that `metrics.rate.bd_rate` does not leave out.
    """
    both = [[p.curves[metric] for p in side if metric in p.curves] for side in (anchor, points)]
    if len({point.images for side in both for point in side}) != 1:
        return None
    return bd_rate(*([(p.bpp, SIGNS[metric] * p.value) for p in side] for side in both))
