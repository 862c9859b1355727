"""Rotary position embedding in two dimensions (RoFormer, arXiv:2104.09864).

Half of a head's channels are rotated by angles in proportion to the token's row, and the other half
in proportion to its column. Attention between two tokens then uses only their distances in rows and
in columns, not their positions. So a network works on grids of any height and width.

`B` batch, `N` tokens (N = h w), `D` channels of a head.
"""

import torch
from einops import rearrange
from torch import Tensor

# The largest wavelength is about 2 pi BASE positions. Text models have a base of 10,000, but the
# sides of a grid of tokens are short. With 100, most channels distinguish near positions.
BASE = 100.0


def grid(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return the places (row, column) of a grid's tokens, row by row, (N, 2), float32."""
    rows, columns = (
        torch.arange(side, device=device, dtype=torch.float32) for side in (height, width)
    )
    return torch.cartesian_prod(rows, columns)


def rotations(places: Tensor, *, channels: int) -> Tensor:
    """Return the cosines and sines of all angles, (2, N, D / 2), float32.

    Args:
        places: row and column of each token, (N, 2). They may be fractions.
        channels: D, a multiple of 4.
    """
    exponents = torch.arange(0, channels, 4, device=places.device, dtype=torch.float32) / channels
    angles = rearrange(places[:, :, None] * BASE**-exponents, "N side angle -> N (side angle)")
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate queries or keys (B, heads, N, D) by the positions of their tokens.

    Args:
        turns: the result of `rotations`. Channels i and i + D / 2 form a plane, which turns by
            angle number i.
    """
    cos, sin = turns
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
