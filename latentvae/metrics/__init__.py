"""Measure reconstructions and latents.

The metrics of image pairs can be imported from `latentvae.metrics`, and all other metrics from the
modules of this package that define them.
"""

from latentvae.metrics.image import ms_ssim, psnr, round_alike, ssim, to_8bit

__all__ = ["ms_ssim", "psnr", "round_alike", "ssim", "to_8bit"]
