"""The image metrics against scikit-image and against formulas written here."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from latentvae.errors import UserError
from latentvae.metrics import ms_ssim, psnr, round_alike, ssim, to_8bit


def pair(size: int = 96, *, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Two parts of a photograph (2, 3, H, W) on the 8-bit grid, and noisy copies of them."""
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 127.5 - 1
    images = torch.stack([photo[:, :size, :size], photo[:, 150 : 150 + size, 100 : 100 + size]])
    generator = torch.Generator().manual_seed(0)
    strength = torch.tensor([noise, 2 * noise]).view(2, 1, 1, 1)
    recon = images + strength * torch.randn(images.shape, generator=generator)
    return to_8bit(images), to_8bit(recon)


def to_uint8(image: Tensor) -> np.ndarray:
    return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_to_8bit_keeps_the_grid_clamps_the_rest_and_errs_by_half_a_level() -> None:
    grid = torch.arange(256).view(1, 1, 16, 16) / 127.5 - 1
    torch.testing.assert_close(to_8bit(grid), grid, rtol=0, atol=1e-6)
    assert to_8bit(torch.tensor([-3.0, 7.0])).tolist() == [-1.0, 1.0]
    values = torch.linspace(-1, 1, 10_001)
    assert (to_8bit(values) - values).abs().max().item() <= 1 / 255 + 1e-6


def test_psnr_equals_scikit_image_of_the_8_bit_pictures() -> None:
    images, recon = pair()
    expected = [
        peak_signal_noise_ratio(to_uint8(x), to_uint8(y))
        for x, y in zip(images, recon, strict=True)
    ]
    np.testing.assert_allclose(psnr(images, recon).numpy(), expected, rtol=1e-5)


def test_psnr_of_one_level_everywhere_and_of_equal_images() -> None:
    images = torch.zeros(1, 3, 8, 8)
    assert psnr(images, images + 2 / 255).item() == pytest.approx(20 * np.log10(255), rel=1e-5)
    assert psnr(images, images).item() == float("inf")


def test_ssim_equals_scikit_image() -> None:
    images, recon = pair()
    expected = [
        structural_similarity(
            to_uint8(x),
            to_uint8(y),
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(images, recon, strict=True)
    ]
    np.testing.assert_allclose(ssim(images, recon).numpy(), expected, atol=2e-5)


def reference_ms_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang, Simoncelli and Bovik 2003, of one channel in [0, 1]; filters by SciPy."""
    weights, product = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333], 1.0

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

    for scale, weight in enumerate(weights):
        mean_x, mean_y = blur(x), blur(y)
        variance = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        contrast = (2 * (blur(x * y) - mean_x * mean_y) + 0.03**2) / (variance + 0.03**2)
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        term = contrast * luminance if scale == 4 else contrast
        product *= max(term.mean(), 0.0) ** weight
        odd = [(0, side % 2) for side in x.shape]
        x, y = (np.pad(image, odd, mode="symmetric") for image in (x, y))
        x, y = ((z[::2] + z[1::2]) / 2 for z in (x, y))
        x, y = ((z[:, ::2] + z[:, 1::2]) / 2 for z in (x, y))
    return product


def test_ms_ssim_equals_the_formula_for_grey_images() -> None:
    images, recon = (x.mean(1, keepdim=True) for x in pair(size=181))
    expected = [
        reference_ms_ssim(*((z[0].double().numpy() + 1) / 2 for z in both))
        for both in zip(images, recon, strict=True)
    ]
    value = ms_ssim(images, recon)
    assert value is not None
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-4)


def test_ms_ssim_is_absent_below_161_pixels() -> None:
    assert ms_ssim(*(torch.zeros(2, 1, 1, 160, 300))) is None
    value = ms_ssim(*(torch.zeros(2, 1, 1, 161, 161)))
    assert value is not None and value.tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_one_value_per_image_whatever_the_batch(metric) -> None:
    images, recon = pair()
    alone = torch.cat([metric(images[i : i + 1], recon[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(metric(images, recon), alone)
    assert alone.shape == (2,)


def test_ssim_of_too_small_images_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="at least 11 pixels"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="same shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_only_what_is_beside_8_bits_is_rounded_to_8_bits():
    levels = torch.arange(64, dtype=torch.float32).view(1, 1, 8, 8)
    of_8_bits, of_16_bits = levels / 127.5 - 1, levels * 999 / 32767.5 - 1
    images = torch.cat([of_8_bits, of_16_bits])
    recon = images + 0.3 / 127.5
    rounded = round_alike(recon, images)
    assert torch.equal(rounded[0], images[0])
    assert torch.equal(rounded[1], recon[1])
    assert psnr(images, rounded)[0] == torch.inf and psnr(images, rounded)[1] < 60
    assert round_alike(images * 3, images).abs().max() == 1
