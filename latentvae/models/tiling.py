"""Set the tiles in which diffusers' classes encode and decode large images.

diffusers' classes store the overlap of tiles in two ways. Classes like AutoencoderKL store the
overlap as a fraction of a tile's side. Classes like AutoencoderDC store the distance from one tile
to the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Tiling:
    """Overlap of a network's square tiles, and the way in which its class stores the overlap.

    Args:
        share: fraction of a tile's side that the next tile overlaps.
        by_factor: whether the class stores the fraction `share`. If `by_factor` is False, the class
            stores the distance from one tile to the next.
    """

    share: Fraction
    by_factor: bool

    @property
    def step(self) -> int:
        """Number that must divide the side of a tile, in latent positions.

        If the class stores the overlap as a fraction, diffusers rounds overlap and stride
        separately. The tiles fit together only if the overlap is a whole number of latent
        positions.
        """
        return self.share.denominator if self.by_factor else 1

    def attributes(self, *, size: int, overlap: int, f: int) -> dict[str, int]:
        """Return names and values of the network's attributes that give tiles of this size.

        Args:
            size: latent positions on a side of a tile.
            overlap: latent positions that the next tile overlaps.
            f: pixels on a side of one latent position.
        """
        pixels = size * f
        if self.by_factor:
            return {"tile_latent_min_size": size, "tile_sample_min_size": pixels}
        stride = pixels - overlap * f
        words = {"latent_min": size, "sample_min": pixels, "sample_stride": stride}
        return {f"tile_{w}_{side}": n for w, n in words.items() for side in ("height", "width")}


def read_tiling(net: Any, *, f: int) -> Tiling | None:
    """Return the overlap of a network's tiles, or None if its class cannot compute in tiles.

    AutoencoderTiny computes its tiles with `spatial_scale_factor`. If this value differs from the
    true downsampling factor `f`, tiles would be wrong, so the function returns None.

    Args:
        net: the network.
        f: pixels on a side of one latent position.
    """
    if not hasattr(net, "use_tiling") or getattr(net, "spatial_scale_factor", f) != f:
        return None
    if hasattr(net, "tile_overlap_factor"):
        share, by_factor = net.tile_overlap_factor, True
    elif hasattr(net, "tile_sample_stride_width"):
        share, by_factor = 1 - net.tile_sample_stride_width / net.tile_sample_min_width, False
    else:
        return None
    return Tiling(Fraction(share).limit_denominator(64), by_factor)


@contextmanager
def tile_settings(net: Any, **values: Any) -> Iterator[None]:
    """Set attributes of `net` inside the context, then restore them."""
    before = {name: getattr(net, name) for name in values}
    try:
        for name, value in values.items():
            setattr(net, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(net, name, value)
