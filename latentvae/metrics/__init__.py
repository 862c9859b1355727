"""How good reconstructions are: measures of images, and their means with an interval."""

from latentvae.metrics.image import ms_ssim, psnr, ssim, to_8bit
from latentvae.metrics.summary import Interval, mean_and_ci95

__all__ = ["Interval", "mean_and_ci95", "ms_ssim", "psnr", "ssim", "to_8bit"]
