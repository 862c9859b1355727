"""Large images in exact strips; see `network` for what it computes, and
`price` for what it costs."""

from latentvae.models.strips.maps import Strips
from latentvae.models.strips.network import check_supported, decode_in_strips, encode_in_strips
from latentvae.models.strips.price import Price, price_in_strips

__all__ = [
    "Price",
    "Strips",
    "check_supported",
    "decode_in_strips",
    "encode_in_strips",
    "price_in_strips",
]
