"""Rate curves compared: the Bjontegaard delta rate (ITU-T VCEG-M33, 2001).

How many more (or fewer) bits a coder needs than the anchor for the same quality: the mean, over the
qualities that both curves reach, of the difference of log rates. Between measured points the
curves are piecewise cubic and monotone (PCHIP), as JVET's common test conditions have it.
"""

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

Curve = Sequence[tuple[float, float]]  # (bits per pixel, quality), in any order


def bd_rate(anchor: Curve, curve: Curve) -> float | None:
    """Percent of the anchor's bits that `curve` needs more (negative: fewer), at equal quality.

    Points that cost more than another one of at least their quality are left out. None where fewer
    than two points are left of a curve, or no quality is reached by both.
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
    """(n, 2), finite, by rate, quality rising strictly: the points that no other one beats."""
    kept: list[tuple[float, float]] = []
    for bpp, quality in sorted(curve, key=lambda point: (point[0], -point[1])):
        if bpp > 0 and np.isfinite(quality) and (not kept or quality > kept[-1][1]):
            kept.append((bpp, quality))
    return np.array(kept).reshape(-1, 2)
