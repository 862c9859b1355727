"""Find the nearest code of each vector, in tiles of the distance matrix to save memory.

For a vector v and codes c_k, argmin_k |v - c_k|^2 = argmax_k s_k, with the scores s_k = <v, c_k> -
|c_k|^2 / 2. The scores are computed for a tile of some vectors and some codes at a time, by one
matrix product with a bias. The search first finds the largest score of each block of 32 codes, then
the position within the best block. These two steps are faster than one argmax over all codes: a
maximum is limited only by the speed of memory, and an argmax is many times slower.

`N` vectors, `K` codes, `D` code width, `n` vectors of a tile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # Number of codes in a block.
# Largest number of codes in a tile. The scores of 256 vectors and 4096 codes take 4 MiB, which fits
# into the caches of a CPU.
CODES = 4096
# Number of scores in a tile. Larger tiles mean fewer kernel launches on a GPU.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**23


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return the index of each vector's nearest code (Euclidean).

    If several codes are equally near, the lowest index is returned. The search runs in float32,
    also under autocast. The codebook's mean is first subtracted from vectors and codes, so that a
    large mean does not reduce the precision of the distances.

    Args:
        vectors: N vectors of D channels, (N, D), of any float dtype. A vector that is not finite
            gets an arbitrary index.
        codebook: the K codes, (K, D).
        chunk: number of distances in memory at a time, at least 32. The default is 2^20 on the CPU
            (4 MiB) and 2^23 on other devices.

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
    """Return the index of the nearest code for each of the n vectors in `part`, (n,).

    The codes, padded to whole blocks, are searched in tiles of `rows` codes. `bias` is minus half
    the squared length of each code, and `tile` is a buffer for the scores of one tile.
    """
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
