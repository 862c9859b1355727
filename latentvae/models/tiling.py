"""How diffusers' classes are told to decode in tiles: one of two sets of attributes.

Classes like AutoencoderKL take the share of a tile that the next one overlaps, others the distance
from one tile to the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Tiling:
    """Square tiles, in the words of a network's class.

    Args:
        share: of a tile's side that the next one overlaps.
        by_factor: the class takes that share, and else a distance.
    """

    share: Fraction
    by_factor: bool

    @property
    def step(self) -> int:
        """Tiles are a multiple of so many latent positions on a side.

        With a share, diffusers rounds overlap and stride by themselves: tiles whose overlap is not
        a whole number of latent positions would not fit together.
        """
        return self.share.denominator if self.by_factor else 1

    def attributes(self, *, size: int, overlap: int, f: int) -> dict[str, int]:
        """What to set on the network for tiles of `size` latent positions on a side, of which the
        next one overlaps `overlap`."""
        pixels = size * f
        if self.by_factor:
            return {"tile_latent_min_size": size, "tile_sample_min_size": pixels}
        stride = pixels - overlap * f
        words = {"latent_min": size, "sample_min": pixels, "sample_stride": stride}
        return {f"tile_{w}_{side}": n for w, n in words.items() for side in ("height", "width")}


def read_tiling(net: Any, *, f: int) -> Tiling | None:
    """What a network of `f` pixels per latent position has of these attributes, or None.

    AutoencoderTiny's tiles are right for `spatial_scale_factor` alone, which it does not take from
    its number of blocks.
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
    """Attributes of `net` for a while."""
    before = {name: getattr(net, name) for name in values}
    try:
        for name, value in values.items():
            setattr(net, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(net, name, value)
