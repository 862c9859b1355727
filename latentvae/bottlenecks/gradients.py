"""How the decoder's gradient passes a quantiser: values of the codes, gradients to the vectors.

`N` vectors, `D` their width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.errors import UserError, nearest

SMALLEST_NORM = 1e-6  # a shorter vector has no direction

Gradient = Callable[[Tensor, Tensor], Tensor]


def straight_through(vectors: Tensor, quantised: Tensor) -> Tensor:
    """Return ``quantised`` exactly, with the gradient of ``vectors``; both of any one shape."""
    return quantised.detach() + (vectors - vectors.detach())


def rotation(vectors: Tensor, quantised: Tensor) -> Tensor:
    """Return ``quantised`` exactly, as the rotation and scaling of ``vectors`` (N, D) that leads
    there. Both count as constants (rotation trick, arXiv:2410.06424, section 4.2)."""
    vector, quantised = vectors.detach(), quantised.detach()
    norm, target = (v.norm(dim=1, keepdim=True) for v in (vector, quantised))
    e, q = vector / norm.clamp(min=SMALLEST_NORM), quantised / target.clamp(min=SMALLEST_NORM)
    r = F.normalize(e + q, dim=1)
    scale = torch.where(norm > SMALLEST_NORM, target / norm.clamp(min=SMALLEST_NORM), 1.0)

    def along(a: Tensor, b: Tensor) -> Tensor:
        return b * (moved * a).sum(1, keepdim=True)

    moved = vectors - vector  # zero, with a gradient
    return quantised + scale * (moved - 2 * along(r, r) + 2 * along(e, q))


GRADIENTS: dict[str, Gradient] = {"straight_through": straight_through, "rotation": rotation}


def gradient_of(name: str) -> Gradient:
    """Return the gradient of that name.

    Raises:
        UserError: there is none.
    """
    if name not in GRADIENTS:
        allowed = " or ".join(GRADIENTS)
        raise UserError(f"gradient is {name!r}; it is {allowed}{nearest(name, GRADIENTS)}")
    return GRADIENTS[name]
