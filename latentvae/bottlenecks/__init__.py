"""Bottlenecks: modules that turn encoder features into a posterior or into codes.

Each bottleneck has its own file. `table.BOTTLENECKS` lists all bottlenecks.
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
