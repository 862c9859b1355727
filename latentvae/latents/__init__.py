"""Latents and tokens: their statistics, shards, `encode` and `decode`."""

from latentvae.latents.statistics import LatentStatistics, latent_statistics

__all__ = ["LatentStatistics", "latent_statistics"]
