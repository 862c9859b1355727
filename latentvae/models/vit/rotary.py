"""Rotary position embedding in two dimensions (RoFormer, arXiv:2104.09864).

Half of a head's channels turn with the row of a token, and the other half with its column. Two
tokens then see of their positions only the distance in rows and in columns. So a network works on
grids of any height and width.

`B` batch, `N` tokens (N = h w), `D` channels of a head.
"""

import torch
from einops import repeat
from torch import Tensor

# The largest wavelength is about 2 pi BASE positions. Text models have a base of 10,000, but the
# sides of a grid of tokens are short. With 100, most channels distinguish near positions.
BASE = 100.0


def rotations(height: int, width: int, *, channels: int, device: torch.device) -> Tensor:
    """Return the cosines and sines of all angles, (2, N, D / 2), float32.

    Args:
        height, width: sides h and w of the grid. Its tokens are in the order row by row.
        channels: D, a multiple of 4.
    """
    exponents = torch.arange(0, channels, 4, device=device, dtype=torch.float32) / channels
    rows, columns = (
        torch.arange(side, device=device, dtype=torch.float32)[:, None] * BASE**-exponents
        for side in (height, width)
    )
    angles = torch.cat(
        [
            repeat(rows, "h angle -> (h w) angle", w=width),
            repeat(columns, "w angle -> (h w) angle", h=height),
        ],
        dim=1,
    )
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate queries or keys (B, heads, N, D) by the positions of their tokens.

    Args:
        turns: the result of `rotations`. Channels i and i + D / 2 form a plane, which turns by the
            angle i.
    """
    cos, sin = turns
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
