"""Search of the nearest code in tiles: memory grows with the tile, never with N x K.

argmin_k |v - c_k|^2 = argmax_k v . c_k - |c_k|^2 / 2, so a tile of scores is one matrix product
with a bias. The largest of each block of 32 codes is found first, then the place within the best
block: a maximum over rows runs at the speed of memory, an argmax many times slower.

`N` vectors, `K` codes, `D` their width, `n` vectors of a tile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # codes of which the best is found at once
CODES = 4096  # codes of a tile at most: 256 vectors x 4096 codes is 4 MiB, which caches hold
CPU_CHUNK, GPU_CHUNK = 2**20, 2**23  # a GPU has launches to save


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor, *, chunk: int | None = None) -> Tensor:
    """Index of the code at the smallest Euclidean distance, the lowest among equals.

    In float32 under any autocast. Vectors and codes are taken from the codebook's mean, so that an
    offset which all share costs no digits.

    Args:
        vectors: (N, D), any float dtype; one that is not finite gets some index.
        codebook: (K, D).
        chunk: how many scores are held at a time, at least 32; left out, 2^20 on the CPU (4 MiB)
            and 2^23 elsewhere.

    Returns:
        (N,), int64.
    """
    chunk = chunk or (CPU_CHUNK if vectors.device.type == "cpu" else GPU_CHUNK)
    with torch.autocast(vectors.device.type, enabled=False):
        offset = codebook.float().mean(0)
        codes = F.pad(codebook.float() - offset, (0, 0, 0, -len(codebook) % BLOCK))
        bias = codes.square().sum(1, keepdim=True) / -2
        bias[len(codebook) :] = -torch.inf  # what fills the last block is never the nearest
        rows = min(len(codes), CODES, max(chunk // BLOCK, 1) * BLOCK)
        columns = max(chunk // rows, 1)
        tile = codes.new_empty(rows * columns)
        parts = (part.float() - offset for part in vectors.split(columns))
        return torch.cat([_nearest(part, codes, bias, rows=rows, tile=tile) for part in parts])


def _nearest(part: Tensor, codes: Tensor, bias: Tensor, *, rows: int, tile: Tensor) -> Tensor:
    """(n,) of vectors (n, D): the best over tiles of codes."""
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
        indices = torch.where(score > best, found, indices)  # not >=: the lowest among equals
        best = torch.maximum(best, score)
    return indices
