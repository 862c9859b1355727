"""Large images in exact strips; see `network`."""

from latentvae.models.strips.maps import Strips
from latentvae.models.strips.network import check_supported, decode_in_strips, encode_in_strips

__all__ = [
    "Strips",
    "check_supported",
    "decode_in_strips",
    "encode_in_strips",
]
