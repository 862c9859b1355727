"""Store maps of codes of several levels in one tensor, and read them back.

The coarsest level has a map of h x w codes, and each further level is twice as fine: 2h x 2w, and
so on. The image's sequence of tokens lists the codes of one level after the other, coarsest first.
The codes of a level are listed row by row. The tensor (B, P, h, w) holds the sequence of tokens,
cut into P planes of h x w codes. With three levels, P is 1 + 4 + 16. Plane 0 is the coarsest map.
Planes 1 to 4 are the next map, read row by row and cut into four equal parts. So
`indices.flatten(1)` is the sequence of tokens, and the tensor's shape also gives h and w.

`B` batch, `P` codes per coarsest position, `h w` size of the coarsest map.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def join_levels(maps: Sequence[Tensor]) -> Tensor:
    """Return indices (B, P, h, w) of all levels, or the map itself if there is one level.

    P is the number of codes per position of the coarsest map.

    Args:
        maps: the map (B, h_l, w_l) of each level l, coarsest first.
    """
    if len(maps) == 1:
        return maps[0]
    batch, height, width = maps[0].shape
    return torch.cat([level.reshape(batch, -1, height, width) for level in maps], dim=1)


def split_levels(indices: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the map (B, h_l, w_l) of each level l, coarsest first.

    Args:
        indices: the result of `join_levels`, (B, P, h, w) with P codes per position of the coarsest
            map. Another shape of the same values is allowed, if its first dimension is B.
        sizes: height and width (h_l, w_l) of the map of each level l, coarsest first.
    """
    parts = indices.flatten(1).split([math.prod(size) for size in sizes], dim=1)
    return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]
