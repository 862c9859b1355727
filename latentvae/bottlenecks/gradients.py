"""Functions that pass the decoder's gradient through a quantiser to the encoder.

Quantisation has no useful gradient of its own. Each function in `GRADIENTS` returns the values of
the codes, and passes the gradient of the codes to the encoder's vectors.

`N` vectors, `D` code width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.errors import UserError, nearest

SMALLEST_NORM = 1e-6  # the direction of a shorter vector is not used

Gradient = Callable[[Tensor, Tensor], Tensor]


def straight_through(vectors: Tensor, quantised: Tensor) -> Tensor:
    """Return ``quantised`` exactly, and pass its gradient to ``vectors`` of the same shape."""
    return quantised.detach() + (vectors - vectors.detach())


def rotation(vectors: Tensor, quantised: Tensor) -> Tensor:
    """Return ``quantised`` exactly, and pass its rotated and scaled gradient to ``vectors``.

    ``vectors`` and ``quantised`` have N rows of D channels, (N, D). Row i of ``quantised`` is row i
    of ``vectors``, rotated and scaled. The gradient treats the rotation and the scale as constants
    (rotation trick, arXiv:2410.06424, section 4.2).
    """
    vector, quantised = vectors.detach(), quantised.detach()
    norm, target = (v.norm(dim=1, keepdim=True) for v in (vector, quantised))
    e, q = vector / norm.clamp(min=SMALLEST_NORM), quantised / target.clamp(min=SMALLEST_NORM)
    r = F.normalize(e + q, dim=1)
    scale = torch.where(norm > SMALLEST_NORM, target / norm.clamp(min=SMALLEST_NORM), 1.0)

    def along(a: Tensor, b: Tensor) -> Tensor:
        return b * (moved * a).sum(1, keepdim=True)

    moved = vectors - vector  # the value is zero, with a gradient to `vectors`
    return quantised + scale * (moved - 2 * along(r, r) + 2 * along(e, q))


GRADIENTS: dict[str, Gradient] = {"straight_through": straight_through, "rotation": rotation}


def gradient_of(name: str) -> Gradient:
    """Return the function in `GRADIENTS` with this name.

    Raises:
        UserError: `GRADIENTS` has no function with this name.
    """
    if name not in GRADIENTS:
        allowed = " or ".join(GRADIENTS)
        raise UserError(f"gradient must be {allowed} (got {name!r}){nearest(name, GRADIENTS)}")
    return GRADIENTS[name]
