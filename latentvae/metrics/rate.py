"""Compare two rate curves by the Bjontegaard delta rate, or BD rate (ITU-T VCEG-M33, 2001).

The BD rate says how many more or fewer bits a coder needs than a reference coder (the anchor) for
the same quality. The BD rate is the mean difference of log rates over the qualities that both
curves reach, converted to percent. Between measured points the curves are piecewise cubic and
monotone (PCHIP), as in JVET's common test conditions.
"""

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

Curve = Sequence[tuple[float, float]]  # (bits per pixel, quality), in any order


def bd_rate(anchor: Curve, curve: Curve) -> float | None:
    """Return how many percent more bits `curve` needs than `anchor` at equal quality.

    A curve consists of points (bits per pixel, quality). A negative result means fewer bits. A
    point is left out if its quality is not finite, if its bits are not positive, or if another
    point of its curve has at least this quality and needs no more bits. The result is None if fewer
    than two points of a curve are left, or if the curves have no range of qualities in common.
    """
    curves = [_rising(anchor), _rising(curve)]
    if min(map(len, curves)) < 2:
        return None
    low = max(points[0, 1] for points in curves)
    high = min(points[-1, 1] for points in curves)
    if low >= high:
        return None
    first, second = (
        PchipInterpolator(points[:, 1], np.log(points[:, 0])).integrate(low, high)
        for points in curves
    )
    return float(np.expm1((second - first) / (high - low)) * 100)


def _rising(curve: Curve) -> np.ndarray:
    """Return the curve's points (n, 2) sorted by rate, without points that another point beats.

    A point beats another point if its quality is at least as high and it needs no more bits.
    Points without a finite quality or a positive rate are left out.
    """
    kept: list[tuple[float, float]] = []
    for bpp, quality in sorted(curve, key=lambda point: (point[0], -point[1])):
        if bpp > 0 and np.isfinite(quality) and (not kept or quality > kept[-1][1]):
            kept.append((bpp, quality))
    return np.array(kept).reshape(-1, 2)
