"""Encode images to shards of latents or tokens, measure their statistics, and decode them."""

from latentvae.latents.statistics import LatentStatistics, latent_statistics

__all__ = ["LatentStatistics", "latent_statistics"]
