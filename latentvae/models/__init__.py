"""Networks: stock diffusers classes wherever one exists, and the thin wrappers that training
prepares."""

from latentvae.models.kl import KLTrainingWrapper, build_autoencoder_kl, downsampling_factor

__all__ = ["KLTrainingWrapper", "build_autoencoder_kl", "downsampling_factor"]
