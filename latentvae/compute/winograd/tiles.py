"""Compute 3 x 3 convolutions and their gradients as matrix products: Winograd's F(4 x 4, 3 x 3).

The algorithm needs 36 products for 16 outputs instead of 144 (Lavin and Gray 2015,
arXiv:1509.09308):

    Y = A [sum_i (G w G') * (B X B')] A'    for a tile Y of 4 x 4, which reads X of 6 x 6

The input tile is X, the kernel is w, and i is an input channel. A, B and G are constant matrices,
`'` is the transpose, and `*` multiplies elements. The sums over channels are 36 matrix products.
Each transform of rows and columns is one more matrix product, with the Kronecker product of A, B or
G with itself (`A2`, `B2`, `G2`). The gradients follow from the formula for Y. M is the sum in
square brackets, o is an output channel, and dY is the gradient of Y:

    dM = A' dY A,    dw = G' [sum_tiles (B X B') * dM] G,    dX = B' [sum_o (G w G') * dM] B

Where tiles of X overlap, their gradients dX are added. The rounding error in float32 is 2e-6 to
4e-6 of the result's standard deviation, which is ten times the error of a plain convolution.

Functions that are called many times use view and permute, because einops takes 10 us per call.

`N` images, `I O` channels in and out, `H W` height and width, `T` tiles.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

SIDE = 4  # Side of an output tile in positions. An input tile is larger by 2.
CHUNK_BYTES = 8 << 20  # Bytes of the tiles that are computed at a time. They fit into the cache.


def _square(rows: list[list[float]], *, divide_by: int = 1) -> Tensor:
    matrix = torch.tensor(rows, dtype=torch.float64) / divide_by
    return torch.kron(matrix, matrix).float()


A2 = _square([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
B2 = _square(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
G2 = _square(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], divide_by=24
)


def tiled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `conv2d(x, weight, bias, padding=1)` in float32.

    Args:
        x: N images of I channels, (N, I, H, W).
        weight: kernel for O output channels, (O, I, 3, 3).
        bias: (O,), or None.
    """
    tiling, outputs = Tiling.of(x), len(weight)
    seen, kernel = tiling.split(x, side=SIDE + 2, before=1), _transform_kernel(weight)
    out = x.new_empty(tiling.images, tiling.size[0], SIDE, tiling.size[1], SIDE, outputs)
    for part in tiling.parts(channels=2 * x.shape[1] + outputs):
        products = _transform(B2, seen[part]) @ kernel.transpose(1, 2)
        tiles = _inverse(A2, products, like=seen[part])
        out[part].copy_(tiles.permute(0, 1, 4, 2, 5, 3))
    if bias is not None:
        out += bias
    return tiling.crop(rearrange(out, "n h y w x c -> n (h y) (w x) c"))


def tiled_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, *, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `x` and `weight` of `tiled_conv`, or None if not requested.

    Args:
        gradient: gradient of the output of `tiled_conv`, (N, O, H, W) for N images of O channels.
        x: input of `tiled_conv`.
        weight: kernel of `tiled_conv`.
        of_x: compute the gradient of `x`.
        of_weight: compute the gradient of `weight`.
    """
    tiling, (outputs, inputs) = Tiling.of(x), weight.shape[:2]
    tiles = tiling.split(gradient, side=SIDE, before=0)
    seen = tiling.split(x, side=SIDE + 2, before=1) if of_weight else None
    kernel = _transform_kernel(weight) if of_x else None
    of_kernel = weight.new_zeros(36, outputs, inputs)
    of_seen = x.new_zeros(tiling.images, *(SIDE * n + 2 for n in tiling.size), inputs)

    # sums over all tiles, a few tiles at a time
    for part in tiling.parts(channels=2 * inputs + outputs):
        products = _transform(A2.t(), tiles[part])
        if seen is not None:
            of_kernel.baddbmm_(products.transpose(1, 2), _transform(B2, seen[part]))
        if kernel is not None:
            added = _inverse(B2.t(), products @ kernel, like=tiles[part])
            _add_overlapping(_tiles(of_seen, SIDE + 2)[part], added)

    return (
        tiling.crop(of_seen[:, 1:, 1:]) if of_x else None,
        (G2.t() @ of_kernel.flatten(1)).t().reshape_as(weight) if of_weight else None,
    )


def _transform_kernel(weight: Tensor) -> Tensor:
    """Return the kernel after Winograd's transform, (36, output channels, input channels)."""
    return (G2 @ weight.reshape(-1, 9).t()).view(36, *weight.shape[:2])


def _transform(matrix: Tensor, tiles: Tensor) -> Tensor:
    """Return T = n * h * w tiles after Winograd's transform, (36, T, C).

    Args:
        matrix: one of `A2.t()` and `B2`.
        tiles: h x w tiles of C channels for each of n images, (n, h, w, C, side, side).
    """
    columns = tiles.permute(4, 5, 0, 1, 2, 3).reshape(matrix.shape[1], -1)
    return (matrix @ columns).view(36, -1, tiles.shape[3])


def _inverse(matrix: Tensor, products: Tensor, *, like: Tensor) -> Tensor:
    """Return tiles (n, h, w, C, side, side) after the inverse transform of `products`.

    Args:
        matrix: one of `A2` and `B2.t()`.
        products: transformed T = n * h * w tiles, (36, T, C).
        like: tensor whose first axes have the sizes n, h and w.
    """
    side = math.isqrt(len(matrix))
    tiles = (matrix @ products.flatten(1)).view(side, side, *like.shape[:3], -1)
    return tiles.permute(2, 3, 4, 5, 0, 1)


def _tiles(maps: Tensor, side: int) -> Tensor:
    """Return h x w overlapping tiles of maps (N, H, W, C), as a view (N, h, w, C, side, side)."""
    return maps.unfold(1, side, SIDE).unfold(2, side, SIDE)


def _add_overlapping(tiles: Tensor, added: Tensor) -> None:
    """Add `added` to a view of overlapping tiles.

    Each tile is divided into four parts. Each of four steps adds one part of every tile. The parts
    that one step adds do not overlap, so no sum is lost.
    """
    parts = (slice(0, SIDE), slice(SIDE, None))
    for rows, columns in itertools.product(parts, parts):
        tiles[..., rows, columns] += added[..., rows, columns]


@dataclass(frozen=True)
class Tiling:
    """The division of feature maps into tiles.

    Attributes:
        images: number of images. Each image has one feature map.
        size: number of tiles in a column and in a row of a feature map.
        map_size: height and width of a feature map.
    """

    images: int
    size: tuple[int, int]
    map_size: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor) -> "Tiling":
        height, width = x.shape[2:]
        return cls(len(x), (-(-height // SIDE), -(-width // SIDE)), (height, width))

    def split(self, x: Tensor, *, side: int, before: int) -> Tensor:
        """Return h x w tiles of maps (N, C, H, W) padded with zeros, (N, h, w, C, side, side).

        Each row and column gets `before` zeros at its start, and at least one zero at its end.
        Without the zero at the end, the distances between channels in memory would be multiples of
        a memory page, which makes the copy slow.
        """
        rows, columns = (SIDE * n - m + 1 for n, m in zip(self.size, self.map_size, strict=True))
        padded = F.pad(x, (before, columns, before, rows))
        innermost = padded.flatten(2).transpose(1, 2).contiguous()
        return _tiles(innermost.view(len(x), *padded.shape[2:], -1), side)

    def parts(self, *, channels: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of images and of rows of tiles, to compute one part at a time.

        A part has some complete images, or some rows of tiles of one image. `channels` is the
        number of channels of all tensors that a part needs.
        """
        rows = max(1, CHUNK_BYTES // (36 * 4 * channels * self.size[1]))
        images, rows = max(1, rows // self.size[0]), min(rows, self.size[0])
        for i in range(0, self.images, images):
            for row in range(0, self.size[0], rows):
                yield slice(i, i + images), slice(row, row + rows)

    def crop(self, maps: Tensor) -> Tensor:
        """Return the first H rows and W columns of maps with channels last, as (N, C, H, W)."""
        height, width = self.map_size
        return rearrange(maps[:, :height, :width], "n h w c -> n c h w").contiguous()
