"""`AutoencoderKLFlux2`, FLUX.2's autoencoder.

FLUX.2's pipeline folds 2 x 2 latent positions into channels. The pipeline then normalises the
latents by the stored mean and variance of a batch norm (diffusers, pipeline_flux2.py).
"""

from typing import Any

from latentvae.models.family import Family
from latentvae.models.network import Network
from latentvae.models.normalization import LatentNormalization


class Flux2Family(Family):
    """Methods for `AutoencoderKLFlux2`, whose latents are normalised by a stored batch norm."""

    def normalization(self, net: Network) -> LatentNormalization:
        module: Any = net
        mean, var = module.bn.running_mean, module.bn.running_var
        std = (var + net.config["batch_norm_eps"]).sqrt()
        return LatentNormalization(1.0, 0.0, mean, 1 / std, net.config["patch_size"][0])
