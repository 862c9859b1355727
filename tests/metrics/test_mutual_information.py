"""The mutual information of images and latents, in cases with a known value."""

import math

import pytest
import torch

from latentvae.metrics.mutual_information import mutual_information


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_separate_posteriors_tell_which_image_it_is() -> None:
    means = 100.0 * torch.arange(8.0)[:, None]
    found = mutual_information(means, torch.zeros(8, 1), generator=draws())
    assert found == pytest.approx(math.log(8), abs=1e-6)


def test_equal_posteriors_tell_nothing_whatever_their_kl() -> None:
    means = torch.full((50, 3), 4.0)
    found = mutual_information(means, torch.zeros(50, 3), samples=3, generator=draws())
    assert found == pytest.approx(0.0, abs=1e-9)


def test_a_gaussian_channel_has_its_capacity() -> None:
    """x ~ N(0, 1), z = x + noise of variance 0.25: I = 1/2 ln(1 + 1/0.25)."""
    means = torch.randn(2000, 1, generator=draws())
    logvars = torch.full((2000, 1), math.log(0.25))
    found = mutual_information(means, logvars, samples=4, generator=draws())
    assert found == pytest.approx(0.5 * math.log(5.0), abs=0.03)
