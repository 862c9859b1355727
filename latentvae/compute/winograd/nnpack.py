"""Compute 3 x 3 convolutions with NNPACK, which is part of torch, in float32 on the CPU.

NNPACK computes Winograd's F(6 x 6, 3 x 3), which needs 64 products for 36 outputs instead of 324
(Lavin and Gray 2015, arXiv:1509.09308). The root mean square of the rounding error is 3e-6 to 5e-6
of the output's standard deviation, and the error of single values is up to 7e-5. The rounding error
is ten times the error of a plain convolution, and a thousandth of the error in bfloat16.

`B` batch, `C` channels, `H W` height and width.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 6  # Rows and columns of outputs that are computed together.
WORKSPACE = 256 << 20  # Largest number of bytes for the tiles of one call of NNPACK.


def nnpack_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `conv2d(x, weight, bias, padding=1)` for a 3 x 3 kernel.

    NNPACK is called for each image of a batch separately. For a whole batch, NNPACK would use
    another algorithm, so the result for an image would depend on the number of images. A large map
    is computed in several calls of NNPACK, because NNPACK keeps all tiles of a call in memory. The
    tiles need almost twice the memory of the input and output.
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    rows = _rows(x, outputs=len(weight))
    parts = [_convolve_by_rows(image, weight, bias, rows) for image in x.split(1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows(x: Tensor, *, outputs: int) -> int:
    """Return the number of rows that NNPACK computes in one call.

    The number of rows is chosen so that the tiles of a call fit into `WORKSPACE` bytes, and all
    calls have about the same number of rows.
    """
    height, width = x.shape[2:]
    tiles = -(-height // TILE)
    bytes_of_a_row = 4 * (TILE + 2) ** 2 * (x.shape[1] + outputs) * -(-width // TILE)
    parts = -(-tiles // max(1, WORKSPACE // bytes_of_a_row))
    return TILE * -(-tiles // parts)


def _convolve_by_rows(x: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
    """Convolve one image (1, C, H, W). The result does not depend on `rows`."""
    height = x.shape[2]
    if height <= rows:
        return torch._nnpack_spatial_convolution(x.contiguous(), weight, bias, [1, 1])
    out = x.new_empty(1, len(weight), height, x.shape[3])
    for start in range(0, height, rows):
        end = min(start + rows, height)
        strip = x[:, :, max(start - 1, 0) : end + 1]
        padded = F.pad(strip, (0, 0, int(start == 0), int(end == height)))
        out[:, :, start:end] = torch._nnpack_spatial_convolution(
            padded.contiguous(), weight, bias, [0, 1]
        )
    return out


@lru_cache(maxsize=1)
def has_winograd() -> bool:
    """Return whether the NNPACK in torch supports this processor and computes correctly."""
    # `_nnpack_available` also initialises NNPACK. Without this initialisation, all other calls of
    # NNPACK fail.
    if not (hasattr(torch, "_nnpack_available") and torch._nnpack_available()):
        return False

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator) for s in ((1, 32, 33, 35), (32, 32, 3, 3)))
    with torch.inference_mode():
        try:
            y = nnpack_conv(x, weight, None)
        except RuntimeError:
            return False
        reference = F.conv2d(x, weight, padding=1)
        return bool((y - reference).abs().max() < 1e-4 * reference.std())
