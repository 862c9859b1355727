"""The linear code, against principal components from NumPy."""

import numpy as np
import pytest
import torch
from einops import rearrange

from latentvae.linear_code import LinearCode, PatchMoments

F, D = 4, 5


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth pictures, (6, 3, 24, 32)."""
    noise = torch.randn(6, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, scale_factor=4, mode="bilinear")
    return (smooth + 0.1 * torch.randn(smooth.shape)).clamp(-1, 1)


@pytest.fixture(scope="module")
def code(images: torch.Tensor) -> LinearCode:
    moments = PatchMoments(F)
    for part in images.split([1, 2, 3]):
        moments.update(part)
    return moments.linear_code(D)


def patches(images: torch.Tensor) -> np.ndarray:
    return rearrange(images, "b c (h y) (w x) -> (b h w) (c y x)", y=F, x=F).double().numpy()


def test_it_reconstructs_as_numpys_components(images: torch.Tensor, code: LinearCode) -> None:
    rows = patches(images)
    mean = rows.mean(0)
    _, singular, vectors = np.linalg.svd(rows - mean, full_matrices=False)
    expected = (rows - mean) @ vectors[:D].T @ vectors[:D] + mean
    found = patches(code.decode(code.encode(images)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(code.variances, singular[:D] ** 2 / (len(rows) - 1), rtol=1e-4)

    # the squared error is what the other components hold
    assert ((found - rows) ** 2).sum() == pytest.approx((singular[D:] ** 2).sum(), rel=1e-4)


def test_the_numbers_are_uncorrelated_and_all_of_them_are_exact(images: torch.Tensor) -> None:
    moments = PatchMoments(F)
    moments.update(images)
    whole = moments.linear_code(3 * F * F)
    z = whole.encode(images)
    covariance = rearrange(z, "b d h w -> d (b h w)").cov()
    torch.testing.assert_close(covariance, torch.diag(whole.variances), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(whole.decode(z), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(24, 32), (23, 30), (3, 5), (1, 1)])
def test_sides_may_be_any_number(code: LinearCode, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size) * 2 - 1
    z = code.encode(images)
    assert z.shape == (2, D, -(-size[0] // F), -(-size[1] // F))
    assert code.decode(z, size=size).shape == images.shape


def test_more_numbers_than_a_patch_has_are_refused(images: torch.Tensor) -> None:
    moments = PatchMoments(F)
    moments.update(images)
    with pytest.raises(ValueError, match=r"d must be at most 48, .* \(got 49\)"):
        moments.linear_code(49)
