"""Compute PSNR, SSIM and MS-SSIM of image pairs, one value per pair.

Images are float in [-1, 1]. To measure images as they would be in an 8-bit file, round them with
`to_8bit` first.

- SSIM follows Wang et al. 2004. The window of SSIM is a Gaussian of sigma 1.5 over 11 x 11 pixels,
  only at positions where the window lies inside the image. SSIM is computed for each channel and
  then averaged over channels.
- MS-SSIM follows Wang et al. 2003. MS-SSIM has five scales. From one scale to the next, the images
  are halved by means over 2 x 2 pixels. Negative terms of MS-SSIM count as 0.
- LPIPS is in `losses.perceptual`.

`B` batch, `C` channels, `H W` height and width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from latentvae.errors import UserError

SIGMA = 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for images in [0, 1]
MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2
SSIM_MIN_SIZE = 11  # pixels a side, for one window
MS_SSIM_MIN_SIZE = 161  # pixels a side, for one window at the fifth scale


def to_8bit(images: Tensor) -> Tensor:
    """Return images clamped to [-1, 1] and rounded to the 256 levels of an 8-bit picture.

    The result is in [-1, 1], not in [0, 255].

    A level is the same float on every device, because the code divides by a tensor. On GPUs, a
    division by a Python number would become a product with the number's reciprocal, which is
    rounded differently.
    """
    levels = (images.float().clamp(-1, 1) + 1).mul(127.5).round()
    return levels / levels.new_tensor(127.5) - 1


def round_alike(recon: Tensor, images: Tensor) -> Tensor:
    """Return reconstructions as they would be stored in the format of their images, in [-1, 1].

    A reconstruction is rounded to 8 bits if its image has 8 bits, which means that all values of
    the image are on the 256 levels of `to_8bit`. The reconstruction of any other image is only
    clamped to [-1, 1]. (Rounding to 16 bits would cap PSNR at 107 dB, far above the PSNR of any
    reconstruction.)
    """
    is_8bit = (to_8bit(images) == images).flatten(1).all(1)  # (B,)
    return torch.where(is_8bit[:, None, None, None], to_8bit(recon), recon.float().clamp(-1, 1))


@torch.no_grad()
def psnr(images: Tensor, recon: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,): 10 log10(2**2 / MSE).

    The MSE is a mean over all elements of an image. The peak is 2, the width of [-1, 1], so the
    result equals the PSNR of the same images in [0, 255] with peak 255. Equal images give infinity.
    """
    _check_shapes(images, recon, minimum=1, metric="PSNR")
    mse = (recon.float() - images.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse)


@torch.no_grad()
def ssim(images: Tensor, recon: Tensor) -> Tensor:
    """Return the structural similarity, (B,), 1 for equal images.

    Images need sides of at least 11 pixels.
    """
    _check_shapes(images, recon, minimum=SSIM_MIN_SIZE, metric="SSIM")
    return _similarity(_unit_range(images), _unit_range(recon))[0]


@torch.no_grad()
def ms_ssim(images: Tensor, recon: Tensor) -> Tensor | None:
    """Return the multi-scale structural similarity, (B,), 1 for equal images.

    The result is None if a side has fewer than 161 pixels.
    """
    _check_shapes(images, recon, minimum=1, metric="MS-SSIM")
    if min(images.shape[2:]) < MS_SSIM_MIN_SIZE:
        return None
    x, y = _unit_range(images), _unit_range(recon)
    product = torch.ones(len(images), device=images.device)
    for exponent in MS_SSIM_EXPONENTS[:-1]:
        product *= _similarity(x, y)[1].relu() ** exponent
        x, y = _halve(x), _halve(y)
    return product * _similarity(x, y)[0].relu() ** MS_SSIM_EXPONENTS[-1]


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return SSIM, and SSIM without its luminance term, as means over windows, (B,) each.

    Args:
        x, y: images in [0, 1], because SSIM's constants `C1` and `C2` are made for this range.
    """
    moments = _window_means(torch.cat([x, y, x * x, y * y, x * y], dim=1))
    mean_x, mean_y, xx, yy, xy = moments.chunk(5, dim=1)
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    contrast = (2 * cov + C2) / (var_x + var_y + C2)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return (luminance * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def _window_means(maps: Tensor) -> Tensor:
    """Return the weighted mean of each channel in each window, (B, C, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_MIN_SIZE, device=maps.device) - SSIM_MIN_SIZE // 2
    weights = (-(offsets.float() ** 2) / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    window = torch.outer(weights, weights).expand(maps.shape[1], 1, -1, -1)
    return F.conv2d(maps, window, groups=maps.shape[1])


def _halve(images: Tensor) -> Tensor:
    """Return means of 2 x 2 pixels.

    If the height or width is odd, repeat the last row or column, as in the code of Wang et al.
    """
    height, width = images.shape[2:]
    return F.avg_pool2d(F.pad(images, (0, width % 2, 0, height % 2), mode="replicate"), 2)


def _unit_range(images: Tensor) -> Tensor:
    """Return images in [0, 1], the range of SSIM's constants."""
    return (images.float() + 1) / 2


def _check_shapes(images: Tensor, recon: Tensor, *, minimum: int, metric: str) -> None:
    if images.shape != recon.shape or images.ndim != 4:
        shapes = f"{tuple(images.shape)} and {tuple(recon.shape)}"
        raise ValueError(
            f"{metric} needs two (B, C, H, W) tensors of the same shape (got {shapes})."
        )
    if min(images.shape[2:]) < minimum:
        size = " x ".join(map(str, images.shape[2:]))
        raise UserError(f"{metric} needs images of at least {minimum} pixels a side (got {size}).")
