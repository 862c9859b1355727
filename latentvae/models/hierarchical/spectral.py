"""Spectral regularisation of NVAE (arXiv:2007.03898, section 3.3): keep layers smooth.

The penalty is the sum of the largest singular values of all convolutions and of the largest
absolute scales of all batch norms. Power iteration estimates the singular values. The power
iteration starts at the same vectors in every call, so it has no state. A resumed training and all
processes thus compute the same penalty.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def spectral_penalty(net: nn.Module, *, iterations: int = 10) -> Tensor:
    """Return the sum of the largest singular values of all convolutions, float32, with gradient.

    The weight of a convolution is read as a matrix (out channels, in channels * side * side) for a
    kernel of side x side. Matrices of the same shape are stacked and processed together. The
    largest absolute scale of each batch norm is added to the sum.

    Args:
        net: any network.
        iterations: steps of the power iteration, which estimates the singular values. The estimate
            is never above the exact value.
    """
    matrices: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    factors: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            matrix = module.weight.float().flatten(1)
            matrices[matrix.shape[0], matrix.shape[1]].append(matrix)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            factors.append(module.weight.float().abs().max())

    norms = [_norms(torch.stack(same), iterations).sum() for same in matrices.values()]
    return torch.stack(norms + factors).sum()


def _norms(matrices: Tensor, iterations: int) -> Tensor:
    """Return the largest singular value of each of N matrices (N, out, in)."""
    with torch.no_grad():
        u = _start(matrices)
        v = F.normalize(u @ matrices, dim=-1)
        for _ in range(iterations):
            u = F.normalize(v @ matrices.transpose(1, 2), dim=-1)
            v = F.normalize(u @ matrices, dim=-1)
    return (u @ matrices @ v.transpose(1, 2)).flatten()


def _start(matrices: Tensor) -> Tensor:
    """Return one random unit vector N times, (N, 1, out), the same in every call of this shape."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 1, matrices.shape[1], generator=generator)
    u = F.normalize(u, dim=-1).to(matrices.device)
    return u.expand(matrices.shape[0], -1, -1)
