"""Latents and tokens: statistics, shards on disk, `encode` (images to shards), `decode` (back)."""

from latentvae.latents.statistics import LatentStatistics, latent_statistics

__all__ = ["LatentStatistics", "latent_statistics"]
