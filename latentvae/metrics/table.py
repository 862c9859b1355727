"""The metrics that compare a reconstruction with its image, one value per image.

A new one is a function in a file of this folder, a line in this table, and its column in
`report.schema.Metrics`. LPIPS is not here: it shares its features with the distances between sets,
see `evaluation.measures.Judge`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from latentvae.metrics.image import MS_SSIM_MIN_SIZE, SSIM_MIN_SIZE, ms_ssim, psnr, ssim


@dataclass(frozen=True)
class ImageMetric:
    """A metric of image pairs.

    Attributes:
        measure: of images and reconstructions, (B, C, H, W) each in [-1, 1], to (B,).
        min_size: pixels of the shorter side from which on it can be measured.
        protocol: how it is measured, as reports say it.
    """

    measure: Callable[[Tensor, Tensor], Tensor | None]
    min_size: int
    protocol: str


IMAGE_METRICS: dict[str, ImageMetric] = {
    "psnr": ImageMetric(
        psnr,
        min_size=1,
        protocol="dB, RGB, peak 255; psnr: mean of the images' own; psnr_pooled: of all pixels",
    ),
    "ssim": ImageMetric(
        ssim,
        min_size=SSIM_MIN_SIZE,
        protocol="per channel, Gaussian window sigma 1.5, 11 x 11 pixels, valid positions",
    ),
    "ms_ssim": ImageMetric(
        ms_ssim,
        min_size=MS_SSIM_MIN_SIZE,
        protocol="as ssim, five scales; not measured below 161 pixels a side",
    ),
}
