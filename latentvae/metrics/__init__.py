"""Metrics of reconstructions and of latents. Each file is imported by its name."""

from latentvae.metrics.image import ms_ssim, psnr, round_alike, ssim, to_8bit

__all__ = ["ms_ssim", "psnr", "round_alike", "ssim", "to_8bit"]
