"""Encode and decode large images strip by strip, with exact results.

A strip is several rows of an image or of a feature map. Only a few strips are computed at a time,
which saves memory. The module `strip_network` encodes and decodes. The module `price` predicts the
time and memory.
"""

from latentvae.compute.strips.maps import Strips
from latentvae.compute.strips.price import Price, price_in_strips
from latentvae.compute.strips.strip_network import (
    StripComputation,
    check_supported,
    decode_in_strips,
    encode_in_strips,
)

__all__ = [
    "Price",
    "StripComputation",
    "Strips",
    "check_supported",
    "decode_in_strips",
    "encode_in_strips",
    "price_in_strips",
]
