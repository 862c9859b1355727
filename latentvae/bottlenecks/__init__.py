"""Bottlenecks: they turn encoder features into a latent, which is a posterior or codes.

Each bottleneck has a file of its own. `table.BOTTLENECKS` lists them all.
"""

from latentvae.bottlenecks.nearest import nearest_codes
from latentvae.bottlenecks.quantized import Quantized, Quantizer
from latentvae.bottlenecks.table import BOTTLENECKS, QUANTIZERS, Bottleneck, build_quantizer

__all__ = [
    "BOTTLENECKS",
    "QUANTIZERS",
    "Bottleneck",
    "Quantized",
    "Quantizer",
    "build_quantizer",
    "nearest_codes",
]
