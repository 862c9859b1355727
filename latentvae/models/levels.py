"""Store maps of codes of several levels in one tensor, and read them back.

The coarsest level has a map of h x w codes, and each further level is twice as fine: 2h x 2w, and
so on. The image's sequence of tokens lists the codes of one level after the other, coarsest first.
The codes of a level are listed row by row. The tensor (B, P, h, w) holds this sequence, cut into
planes of h x w codes. The number of planes P is 1 + 4 + ... for all levels. Plane 0 is the coarsest
map, and planes 1 to 4 are the four quarters, from the top down, of the next map. So
`indices.flatten(1)` is the sequence, and the shape also tells h and w.

`B` batch, `P` codes per coarsest position, `h w` size of the coarsest map.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def join_levels(maps: Sequence[Tensor]) -> Tensor:
    """Return indices (B, P, h, w) of all levels, or the map itself if there is one level.

    Args:
        maps: the map (B, h_l, w_l) of each level, coarsest first.
    """
    if len(maps) == 1:
        return maps[0]
    batch, height, width = maps[0].shape
    return torch.cat([level.reshape(batch, -1, height, width) for level in maps], dim=1)


def split_levels(indices: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the map (B, h_l, w_l) of each level, coarsest first.

    Args:
        indices: (B, P, h, w), or the same sequence in another shape (B, ...).
        sizes: (h_l, w_l) of each level, coarsest first.
    """
    parts = indices.flatten(1).split([math.prod(size) for size in sizes], dim=1)
    return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]
