"""Search for the nearest code in tiles, so that memory grows with the tile, not with N x K.

argmin_k |v - c_k|^2 = argmax_k v . c_k - |c_k|^2 / 2. The scores on the right are computed for one
tile of vectors at a time, by one matrix product with a bias. The search first finds the largest
score of each block of 32 codes, then the position within the best block. This is faster than one
argmax over all codes: a maximum over rows runs at memory speed, and an argmax is many times slower.

`N` vectors, `K` codes, `D` code width, `n` vectors of a tile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # Number of codes in a block.
# Largest number of codes in a tile: the scores of 256 vectors x 4096 codes take 4 MiB, which fits
# into caches.
CODES = 4096
# Number of scores in a tile. Larger tiles mean fewer kernel launches on a GPU.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**23


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return the index of each vector's nearest code (Euclidean). Ties take the lowest index.

    The search runs in float32, also under autocast. The codebook's mean is first subtracted from
    vectors and codes, so that a common offset costs no precision.

    Args:
        vectors: the vectors, (N, D), of any float dtype. A vector that is not finite gets an
            arbitrary index.
        codebook: the codes, (K, D).
        chunk: number of scores in memory at a time, at least 32. Default: 2^20 on the CPU (4 MiB)
            and 2^23 elsewhere.

    Returns:
        The indices, (N,), int64.
    """
    chunk = chunk or (CPU_CHUNK if vectors.device.type == "cpu" else GPU_CHUNK)
    with torch.autocast(vectors.device.type, enabled=False):
        # codes minus their mean, padded to whole blocks
        offset = codebook.float().mean(0)
        codes = F.pad(codebook.float() - offset, (0, 0, 0, -len(codebook) % BLOCK))
        bias = codes.square().sum(1, keepdim=True) / -2
        bias[len(codebook) :] = -torch.inf  # so that padding is never the nearest code

        # search in tiles of rows (codes) and columns (vectors)
        rows = min(len(codes), CODES, max(chunk // BLOCK, 1) * BLOCK)
        columns = max(chunk // rows, 1)
        tile = codes.new_empty(rows * columns)
        parts = (part.float() - offset for part in vectors.split(columns))
        return torch.cat([_nearest(part, codes, bias, rows=rows, tile=tile) for part in parts])


def _nearest(part: Tensor, codes: Tensor, bias: Tensor, *, rows: int, tile: Tensor) -> Tensor:
    """Return the index (n,) of the nearest code of each vector (n, D), tile by tile of codes."""
    n, device = len(part), part.device
    columns = torch.arange(n, device=device)
    best = part.new_full((n,), -torch.inf)
    indices = torch.zeros(n, dtype=torch.int64, device=device)
    for first in range(0, len(codes), rows):
        some = codes[first : first + rows]
        scores = tile[: len(some) * n].view(len(some), n)
        torch.addmm(bias[first : first + rows], some, part.t(), out=scores)
        blocks = scores.view(len(some) // BLOCK, BLOCK, n)
        score, block = blocks.amax(1).max(0)
        found = first + block * BLOCK + blocks[block, :, columns].argmax(1)
        # `>` instead of `>=` keeps the lowest index among equal scores.
        indices = torch.where(score > best, found, indices)
        best = torch.maximum(best, score)
    return indices
