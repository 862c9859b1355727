"""Rotary position embedding in two dimensions (RoFormer, arXiv:2104.09864).

Half of an attention head's channels are rotated by angles in proportion to the token's row. The
other half of the channels are rotated by angles in proportion to the token's column. Attention
between two tokens then depends on their distances in rows and in columns, not on their absolute
positions. So a network with this embedding works on grids of tokens of any size.

`B` batch, `N` tokens (N = h w), `D` channels of an attention head.
"""

import torch
from einops import rearrange
from torch import Tensor

# The largest wavelength is about 2 pi BASE positions. Text models use a base of 10,000. The sides
# of a grid of tokens are much shorter than a text. With 100, most channels differ between positions
# that are close to each other.
BASE = 100.0


def grid(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return row and column of each token of a grid, (height * width, 2), float32.

    The tokens are listed row by row.
    """
    rows, columns = (
        torch.arange(side, device=device, dtype=torch.float32) for side in (height, width)
    )
    return torch.cartesian_prod(rows, columns)


def rotations(places: Tensor, *, channels: int) -> Tensor:
    """Return the cosines and sines of all rotation angles, (2, N, D / 2), float32.

    Args:
        places: row and column of each of N tokens, (N, 2), which need not be whole numbers.
        channels: number of channels D of an attention head, a multiple of 4.
    """
    exponents = torch.arange(0, channels, 4, device=places.device, dtype=torch.float32) / channels
    angles = rearrange(places[:, :, None] * BASE**-exponents, "N side angle -> N (side angle)")
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate queries or keys (B, heads, N, D) by angles that follow from the tokens' positions.

    Args:
        x: queries or keys of N tokens, with D channels per attention head.
        turns: the result of `rotations`. Channels i and i + D / 2 are rotated together, as a point
            of a plane, by angle number i.
    """
    cos, sin = turns
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
