"""What turns encoder features into a latent: a posterior, or codes."""

from typing import Any

from latentvae.bottlenecks.fsq import FiniteScalarQuantizer
from latentvae.bottlenecks.gaussian import GaussianLatent, gaussian_bottleneck
from latentvae.bottlenecks.gumbel import GumbelQuantizer
from latentvae.bottlenecks.lfq import LookupFreeQuantizer
from latentvae.bottlenecks.nearest import nearest_codes
from latentvae.bottlenecks.quantized import Quantized, Quantizer
from latentvae.bottlenecks.residual import ResidualQuantizer
from latentvae.bottlenecks.vector import VectorQuantizer
from latentvae.errors import UserError, nearest

QUANTIZERS: dict[str, Any] = {
    "vq": VectorQuantizer,
    "residual": ResidualQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "gumbel": GumbelQuantizer,
}


def build_quantizer(type: str, **arguments: Any) -> Quantizer:
    """A freshly initialised quantiser.

    Args:
        type: a key of `QUANTIZERS`.
        arguments: of its class.

    Raises:
        UserError: another type, or arguments that are out of range.
    """
    if type not in QUANTIZERS:
        allowed = ", ".join(QUANTIZERS)
        raise UserError(
            f"there is no quantiser {type!r}; it is one of {allowed}{nearest(type, QUANTIZERS)}"
        )
    return QUANTIZERS[type](**arguments)


__all__ = [
    "QUANTIZERS",
    "FiniteScalarQuantizer",
    "GaussianLatent",
    "GumbelQuantizer",
    "LookupFreeQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "VectorQuantizer",
    "build_quantizer",
    "gaussian_bottleneck",
    "nearest_codes",
]
