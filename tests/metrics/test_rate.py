"""Rate curves against a second implementation and against curves that are known."""

import math

import bjontegaard
import numpy as np
import pytest

from latentvae.metrics.rate import bd_rate

JPEG = [(0.221, 23.78), (0.327, 26.58), (0.508, 29.04), (0.85, 31.70), (1.572, 35.24)]
WEBP = [(0.234, 28.33), (0.353, 29.82), (0.513, 31.44), (0.675, 32.88), (0.998, 35.1)]


def test_half_the_bits_everywhere_is_minus_50_percent() -> None:
    assert bd_rate(JPEG, [(bpp / 2, q) for bpp, q in JPEG]) == pytest.approx(-50)
    assert bd_rate(JPEG, [(bpp * 2, q) for bpp, q in JPEG]) == pytest.approx(100)
    assert bd_rate(JPEG, JPEG) == 0


def test_agrees_with_the_bjontegaard_package() -> None:
    expected = bjontegaard.bd_rate(
        *np.array(JPEG).T,
        *np.array(WEBP).T,
        method="pchip",
        require_matching_points=False,
        min_overlap=0,
    )
    assert bd_rate(JPEG, WEBP) == pytest.approx(expected, rel=1e-6)


def test_order_and_dominated_points_do_not_matter() -> None:
    spoiled = [*reversed(WEBP), (0.6, 30.0), (0.353, 20.0), (2.0, math.inf)]
    assert bd_rate(JPEG, spoiled) == bd_rate(JPEG, WEBP)


def test_curves_that_do_not_meet_have_no_difference() -> None:
    assert bd_rate(JPEG, [(0.1, 10.0), (0.2, 12.0)]) is None
    assert bd_rate(JPEG, [(0.5, 30.0)]) is None
    assert bd_rate([], JPEG) is None
