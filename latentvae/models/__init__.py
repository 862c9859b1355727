"""Define the networks and their training wrappers. Many networks are classes of diffusers.

The module `table` lists every kind of network. The modules `family` and `trainable` define the
methods that each kind has. The module `calls` has the functions that other code uses on any
network.
"""

from latentvae.models.conv.discrete_autoencoder import DiscreteAutoencoder
from latentvae.models.conv.kl import build_autoencoder_kl, downsampling_factor
from latentvae.models.family import Family
from latentvae.models.loading import load_network
from latentvae.models.network import Network
from latentvae.models.single_file import SINGLE_FILE_KINDS, SingleFileKind
from latentvae.models.table import FAMILIES, family_of
from latentvae.models.trainable import DiscreteFamily, TrainableFamily
from latentvae.models.vit.vit_kl import ViTAutoencoderKL
from latentvae.models.vit.vit_vq import ViTTokenizer
from latentvae.models.vqvae2.network import VQVAE2
from latentvae.models.wrapper import TrainingWrapper, keep_batch_statistics

__all__ = [
    "FAMILIES",
    "SINGLE_FILE_KINDS",
    "VQVAE2",
    "DiscreteAutoencoder",
    "DiscreteFamily",
    "Family",
    "Network",
    "SingleFileKind",
    "TrainableFamily",
    "TrainingWrapper",
    "ViTAutoencoderKL",
    "ViTTokenizer",
    "build_autoencoder_kl",
    "downsampling_factor",
    "family_of",
    "keep_batch_statistics",
    "load_network",
]
