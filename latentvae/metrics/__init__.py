"""Measure reconstructions and latents.

The metrics of image pairs can be imported from here, and all other metrics from their own modules.
"""

from latentvae.metrics.image import ms_ssim, psnr, round_alike, ssim, to_8bit

__all__ = ["ms_ssim", "psnr", "round_alike", "ssim", "to_8bit"]
