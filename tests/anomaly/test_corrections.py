"""Corrections of likelihoods: units, signs, and what they mend."""

import math

import numpy as np
import pytest
import torch

from latentvae.anomaly.corrections import (
    CODECS,
    input_complexity,
    likelihood_ratio,
    lossless_bits,
)
from latentvae.errors import UserError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    draws = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return draws / 127.5 - 1


@pytest.mark.parametrize("codec", CODECS)
def test_random_pixels_need_their_entropy_and_flat_ones_almost_nothing(codec: str) -> None:
    """Random 8-bit pixels cannot be compressed: 8 bits each, up to the codec's overhead."""
    images = torch.cat([noise(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)])
    bits = lossless_bits(images, codec=codec)
    assert 1 <= bits[0] / (3 * 64 * 64 * 8) < 1.03
    assert bits[1] < bits[0] / 50


def test_the_header_of_a_small_image_does_not_count() -> None:
    black = -torch.ones(1, 1, 1, 1)
    assert lossless_bits(black) == 0 < lossless_bits(black, headerless=False)


def test_bits_are_those_of_the_rounded_pixels() -> None:
    images = noise(2, 1, 16, 16)
    assert (lossless_bits(images) == lossless_bits(images + 0.001)).all()


def test_a_perfect_code_leaves_nothing() -> None:
    """A model that assigns 2^-bits has the same code as the codec: its corrected value is 0."""
    bits = np.array([10.0, 4000.0])
    assert input_complexity(-bits * math.log(2), bits) == pytest.approx([0, 0], abs=1e-9)


def test_complexity_mends_the_rank_of_a_flat_image() -> None:
    """A smooth model rates a flat image above its own images. The correction turns this round."""
    own, flat = 0.3 * noise(8, 1, 28, 28), torch.zeros(8, 1, 28, 28)
    images = torch.cat([own, flat])
    # the exact log-probability of 8-bit pixels under N(0, 0.3) is highest at the mean
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)
    table = torch.log_softmax(-0.5 * (grid / 0.3).square(), dim=0)
    levels = ((images + 1) * 127.5).round().long()
    nats = table[levels].sum(dim=(1, 2, 3)).numpy()
    assert nats[8:].min() > nats[:8].max()  # the known failure
    corrected = input_complexity(nats, lossless_bits(images))
    assert corrected[8:].max() < corrected[:8].min()


def test_ratio_removes_what_the_background_explains() -> None:
    shared, own = np.array([100.0, -5.0]), np.array([1.0, 2.0])
    assert likelihood_ratio(torch.tensor(shared + own), shared) == pytest.approx(own)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: likelihood_ratio(np.zeros(2), np.zeros(3)), "2 and 3 values"),
        (lambda: likelihood_ratio(np.array([np.nan]), np.zeros(1)), "finite"),
        (lambda: input_complexity(np.zeros(1), np.array([-1.0])), "at least 0"),
        (lambda: input_complexity(np.zeros((1, 2)), np.zeros(1)), "one finite value per image"),
        (lambda: lossless_bits(torch.zeros(1, 2, 4, 4)), "images are"),
        (lambda: lossless_bits(torch.zeros(1, 1, 4, 4), codec="gif"), "png, webp"),  # type: ignore
    ],
)
def test_wrong_values_are_one_sentence(call, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()
