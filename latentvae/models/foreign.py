"""Define the methods for networks of diffusers that latentvae can use, but not train."""

from dataclasses import replace

from latentvae.models.family import Family
from latentvae.models.network import Network
from latentvae.models.normalization import LatentNormalization, pooled


class RAEFamily(Family):
    """Methods for `AutoencoderRAE`, a decoder on features of a frozen encoder (arXiv:2510.11690).

    The network's pixels are in [0, 1], and the network itself normalises its latents.
    """

    def takes_unit_range(self, net: Network) -> bool:
        return True

    def normalization(self, net: Network) -> LatentNormalization:
        return replace(pooled(1.0, 0.0), applied=True)
