"""What turns encoder features into a latent."""

from latentvae.bottlenecks.gaussian import gaussian_bottleneck
from latentvae.bottlenecks.nearest import nearest_codes
from latentvae.bottlenecks.quantized import Quantized, Quantizer
from latentvae.bottlenecks.residual import ResidualQuantizer
from latentvae.bottlenecks.vector import VectorQuantizer

__all__ = [
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "VectorQuantizer",
    "gaussian_bottleneck",
    "nearest_codes",
]
