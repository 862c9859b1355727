"""Networks: stock diffusers classes wherever one exists, and the thin wrappers that training
prepares."""

from latentvae.models.kl import KLTrainingWrapper, build_autoencoder_kl, downsampling_factor
from latentvae.models.loading import load_network
from latentvae.models.single_file import FAMILIES, Family

__all__ = [
    "FAMILIES",
    "Family",
    "KLTrainingWrapper",
    "build_autoencoder_kl",
    "downsampling_factor",
    "load_network",
]
