"""Check whether the borders of tiles are visible when diffusers decodes in tiles to save memory.

In a tile, the decoder sees only a part of the image, so the tile's colours may drift. Tiles overlap
and are blended. Blending hides a drift, but not a step at the border of a tile. At such a step, the
difference D between tiled and whole decoding jumps, with the same sign along the border. The value
`seam` measures this step.

    images -> encode -> z -> decode whole  \\
                         \\-> decode tiled  -> D (8-bit levels) -> steps at tile borders -> seam

`B` batch, `C` channels, `H W` pixels, `h w` latent positions, `f` downsampling factor.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentvae.export.tiles import misfit_of_tiles, own_tile
from latentvae.metrics.image import to_8bit
from latentvae.models import Network, family_of
from latentvae.models.calls import decode, encode
from latentvae.models.tiling import Tiling, tile_settings

SEGMENT = 32  # pixels along a border over which a step is averaged. Noise and texture cancel.
SIDE = 4  # pixels to average on each side of a border, so that a thin line does not count as a step
BESIDE = range(SIDE, 16)  # distances in pixels from a border, at which steps have other causes

# Limit in 8-bit levels. One level is 1.7 % of the luminance of mid-grey. A step of one level is
# about the smallest that the eye finds along a straight line, such as banding in 8-bit gradients.
# The second level is a margin for rounding and texture.
VISIBLE_SEAM = 2.0


@dataclass(frozen=True)
class TilingCheck:
    """The measured difference between tiled and whole decoding, both rounded to 8 bits.

    Args:
        psnr: PSNR in dB over all images together. Infinity if tiled and whole decoding agree.
        max_difference: largest difference of any pixel and channel, in 8-bit levels.
        seam: largest step of the difference at a tile's border, in 8-bit levels. A step is a mean
            over `SEGMENT` pixels along the border. A step counts only by the amount that exceeds
            both the largest step of the difference beside the border and the step of the picture
            itself at the border.
        num_images: images that were large enough for more than one tile.
        tile: side of the largest tiles, in pixels.
        as_configured: whether all tiles are those that `enable_tiling()` makes. False if an image
            was too small for these tiles, or if these tiles do not fit together.
    """

    psnr: float
    max_difference: float
    seam: float
    num_images: int
    tile: int
    as_configured: bool

    @property
    def seam_visible(self) -> bool:
        return self.seam > VISIBLE_SEAM

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seam_visible": self.seam_visible}


@dataclass(frozen=True)
class _Tiles:
    """Square tiles of `size` x `size` latent positions. Neighbours share `overlap` positions."""

    size: int
    overlap: int
    f: int

    def borders(self, pixels: int) -> list[int]:
        """Return the pixels at which a tile starts or its blending ends.

        `pixels` is the length of the image side.
        """
        stride, blend = (self.size - self.overlap) * self.f, self.overlap * self.f
        starts = range(stride, pixels, stride)
        return sorted({x for start in starts for x in (start, start + blend) if x < pixels})


def can_tile(net: Network, *, f: int) -> bool:
    """Return whether the class of a network in diffusers can decode in tiles."""
    return family_of(net).tiling(net, f=f) is not None


@torch.no_grad()
def check_tiling(net: Network, images: Sequence[Tensor], *, f: int) -> TilingCheck | None:
    """Decode `images` whole and in tiles, and measure the difference.

    The tiles are those that `enable_tiling()` makes. If an image is no larger than a tile of
    `enable_tiling()`, or if the tiles of `enable_tiling()` do not fit together, the function uses
    tiles of about two thirds of the image's longer side.

    Args:
        net: network in eval mode. The tiles overlap as in the network's tiling settings, which are
            restored at the end.
        images: batches (B, C, H, W) in [-1, 1], on the network's device. `f` divides the sides.
        f: pixels on a side of one latent position.

    Returns:
        None if the network cannot tile, or no image is large enough for two tiles.

    Raises:
        ValueError: a decoded image is not finite.
    """
    tiling = family_of(net).tiling(net, f=f)
    if tiling is None:
        return None
    own = None if misfit_of_tiles(net, f=f) else _own_tiles(net, tiling, f)
    checks = [_check_one(net, batch, tiling, own, f) for batch in images]
    found = [check for check in checks if check is not None]
    if not found:
        return None

    # all images together
    squares, elements = sum(c.squares for c in found), sum(c.elements for c in found)
    return TilingCheck(
        psnr=10 * math.log10(255**2 * elements / squares) if squares else math.inf,
        max_difference=max(c.max_difference for c in found),
        seam=max(c.seam for c in found),
        num_images=sum(c.num_images for c in found),
        tile=max(c.tiles.size for c in found) * f,
        as_configured=all(c.tiles == own for c in found),
    )


def seam_between(tiled: Tensor, whole: Tensor, *, tile: int, overlap: int, f: int) -> float:
    """Return the largest step at a tile border (seam) in images decoded in tiles.

    See `TilingCheck.seam` for the definition.

    Args:
        tiled, whole: decoded images (B, C, H, W).
        tile, overlap: size of a tile and of its overlap, in latent positions.
        f: pixels on a side of one latent position.
    """
    tiles = _Tiles(tile, overlap, f)
    x, y = _levels(tiled).mean(dim=1), _levels(whole).mean(dim=1)  # (B, H, W)
    return max(_largest_seam(x, y, tiles), _largest_seam(x.mT, y.mT, tiles))


@dataclass(frozen=True)
class _Difference:
    squares: float
    elements: int
    max_difference: float
    seam: float
    num_images: int
    tiles: _Tiles


def _check_one(
    net: Network, images: Tensor, tiling: Tiling, own: _Tiles | None, f: int
) -> _Difference | None:
    """Compare tiled and whole decoding of one batch.

    Args:
        own: the tiles that `enable_tiling()` makes, or None if they do not fit together. These
            tiles are used if the images are larger than one of them.
    """
    longer = max(images.shape[2:]) // f
    tiles = own if own and longer > own.size else _choose_tiles(tiling, longer, f)
    if tiles is None:
        return None

    # whole and in tiles
    with tile_settings(net, use_tiling=False):
        z = encode(net, images)
        whole = _levels(decode(net, z))
    attributes = tiling.attributes(size=tiles.size, overlap=tiles.overlap, f=f)
    with tile_settings(net, use_tiling=True, **({} if tiles == own else attributes)):
        tiled = _levels(decode(net, z))

    # compare
    difference = tiled - whole
    x, y = tiled.mean(dim=1), whole.mean(dim=1)  # (B, H, W)
    return _Difference(
        squares=difference.cpu().double().square().sum().item(),
        elements=difference.numel(),
        max_difference=difference.abs().max().item(),
        seam=max(_largest_seam(x, y, tiles), _largest_seam(x.mT, y.mT, tiles)),
        num_images=len(images),
        tiles=tiles,
    )


def _largest_seam(tiled: Tensor, whole: Tensor, tiles: _Tiles) -> float:
    """Return the largest step at a tile border (seam) in `tiled - whole`, (B, H, W) each.

    Seams are measured at the columns where a tile starts or its blending ends. Where tiles change
    fine detail, the difference has steps everywhere, and edges in the picture become stronger or
    weaker. So a seam is only the part of a step that exceeds the steps
    beside it and the picture's edge at the same place.
    """
    width = whole.shape[2]
    borders = [x for x in tiles.borders(width) if SIDE <= x <= width - SIDE]
    if not borders:
        return 0.0
    steps, edges = _steps(tiled - whole), _steps(whole)
    largest = 0.0
    for border in borders:
        beside = [x for k in BESIDE for x in (border - k, border + k) if SIDE <= x <= width - SIDE]
        texture = steps[:, [x - SIDE for x in beside]].amax(dim=1)
        hidden = texture.maximum(edges[:, border - SIDE])
        largest = max(largest, (steps[:, border - SIDE] - hidden).max().item())
    return largest


def _steps(pictures: Tensor) -> Tensor:
    """Return the step at each column, averaged over segments of rows, as an absolute value.

    A step is the mean of the `SIDE` columns that start at the column, minus the mean of the `SIDE`
    columns before the column. The result has the shape (B, W - 2 SIDE + 1, segments).
    """
    sides = F.avg_pool1d(pictures, SIDE, stride=1)
    steps = sides[..., SIDE:] - sides[..., :-SIDE]  # (B, H, x), starting at x = SIDE
    segment = min(SEGMENT, steps.shape[1])
    # Segments overlap by half, so that any stretch of 1.5 segments contains a whole segment.
    return F.avg_pool1d(steps.mT, segment, stride=max(segment // 2, 1)).abs()


def _own_tiles(net: Network, tiling: Tiling, f: int) -> _Tiles:
    """Return the tiles that `enable_tiling()` makes, which must fit together."""
    size = own_tile(net) // f
    return _Tiles(size, int(size * tiling.share), f)


def _choose_tiles(tiling: Tiling, longer: int, f: int) -> _Tiles | None:
    """Return tiles whose side is about two thirds of `longer` latent positions.

    Return None if no such tile is smaller than `longer`.
    """
    size = max(round(longer * 2 / 3 / tiling.step), 1) * tiling.step
    return _Tiles(size, math.ceil(size * tiling.share), f) if size < longer else None


def _levels(recon: Tensor) -> Tensor:
    """Return images in [-1, 1] as the levels of an 8-bit picture, 0 to 255."""
    if not recon.isfinite().all():
        raise ValueError("the network's reconstructions are not finite.")
    return ((to_8bit(recon) + 1) * 127.5).round()
