"""List the metrics that compare a reconstruction with its image, one value per image.

A new metric needs a function in a file of this folder, an entry in `IMAGE_METRICS`, and a column in
`report.schema.Metrics`. `IMAGE_METRICS` does not contain LPIPS, because LPIPS shares its features
with the distances between sets of images. See `evaluation.measures.Judge`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from latentvae.metrics.image import MS_SSIM_MIN_SIZE, SSIM_MIN_SIZE, ms_ssim, psnr, ssim


@dataclass(frozen=True)
class ImageMetric:
    """A metric that compares images with their reconstructions, and how it is measured.

    Attributes:
        measure: function from images and reconstructions, (B, C, H, W) each in [-1, 1], to one
            value per pair, (B,), or to None if the images are too small for the metric.
        min_size: smallest allowed size of an image's shorter side, in pixels.
        protocol: how the metric is measured, for reports.
    """

    measure: Callable[[Tensor, Tensor], Tensor | None]
    min_size: int
    protocol: str


IMAGE_METRICS: dict[str, ImageMetric] = {
    "psnr": ImageMetric(
        psnr,
        min_size=1,
        protocol="dB, RGB, peak 255; psnr: mean over images; psnr_pooled: over all pixels",
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
