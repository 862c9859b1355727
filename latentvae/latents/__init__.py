"""What is measured on latents and, later, how they are stored."""

from latentvae.latents.statistics import LatentStatistics, latent_statistics

__all__ = ["LatentStatistics", "latent_statistics"]
