"""What turns encoder features into a latent."""

from latentvae.bottlenecks.fsq import FiniteScalarQuantizer
from latentvae.bottlenecks.gaussian import gaussian_bottleneck
from latentvae.bottlenecks.gumbel import GumbelQuantizer
from latentvae.bottlenecks.lfq import LookupFreeQuantizer
from latentvae.bottlenecks.quantized import Quantized, Quantizer

__all__ = [
    "FiniteScalarQuantizer",
    "GumbelQuantizer",
    "LookupFreeQuantizer",
    "Quantized",
    "Quantizer",
    "gaussian_bottleneck",
]
