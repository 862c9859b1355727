"""Networks: stock diffusers classes wherever one exists, and the thin wrappers that training
prepares."""

from latentvae.models.conv.kl import TrainingWrapper, build_autoencoder_kl, downsampling_factor
from latentvae.models.conv.vq import DiscreteAutoencoder
from latentvae.models.family import (
    ARCHITECTURES,
    adapt,
    freeze_encoder,
    keep_batch_statistics,
    latent_side,
)
from latentvae.models.loading import load_network
from latentvae.models.single_file import FAMILIES, Family

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "DiscreteAutoencoder",
    "Family",
    "TrainingWrapper",
    "adapt",
    "build_autoencoder_kl",
    "downsampling_factor",
    "freeze_encoder",
    "keep_batch_statistics",
    "latent_side",
    "load_network",
]
