"""Choose and check the tiles that an exported network uses after diffusers' `enable_tiling()`.

AutoencoderKL takes the size of a tile from `sample_size`. AutoencoderKL rounds the stride of tiles
in pixels and their stride in latent positions separately. So both strides agree only if a tile and
its overlap are whole numbers of latent positions. If the strides disagree, each tile is placed some
pixels off, and the decoded image has a wrong size.

`h w` latent positions, `f` downsampling factor.
"""

import itertools
from typing import Any

import torch

from latentvae.errors import first_line
from latentvae.models import Network, family_of
from latentvae.models.calls import decode, encode
from latentvae.models.tiling import tile_settings


def fitting_sample_size(net: Network, side: int) -> int:
    """Return the smallest `sample_size` of at least `side` pixels whose tiles fit together.

    The result is `side` if the network's class does not derive tiles from `sample_size`.

    Args:
        side: longer side of the training images in pixels. The result is at least `side`, so that
            a tile is at least as large as a training image.
    """
    f = family_of(net).latent_shape(net).f
    tiling = family_of(net).tiling(net, f=f)
    if tiling is None or not tiling.by_factor:
        return side
    multiple = tiling.step * f
    return -(-side // multiple) * multiple


@torch.no_grad()
def misfit_of_tiles(net: Network, *, f: int) -> str:
    """Return a sentence that says what is wrong if tiles do not fit together, else "".

    Tiles that do not fit change the size of the image or of the latent. The function encodes and
    decodes an image that is longer than one tile. A tile in a wrong place moves the following
    tiles, so the sizes are right only if all tiles are in the right places.

    Args:
        net: network in eval mode. The network's tiling settings are restored at the end.
        f: pixels on a side of one latent position.
    """
    tiling = family_of(net).tiling(net, f=f)
    if tiling is None:
        return ""

    # an image that is one and a half tiles long, and a few latent positions wide
    multiple = max(family_of(net).side_multiple(net), f)
    width = (own_tile(net) * 3 // 2 // multiple + 1) * multiple
    channels = family_of(net).image_channels(net)
    like = next(itertools.chain(net.parameters(), net.buffers()), torch.zeros(()))
    images = torch.zeros(1, channels, 2 * multiple, width, device=like.device, dtype=like.dtype)
    right = width // f
    advice = f"set a sample_size that is a multiple of {tiling.step * f}"

    # encoding and decoding in tiles
    with tile_settings(net, use_tiling=True):
        try:
            z = encode(net, images)
            found = z.shape[3]
            decoded = decode(net, z.new_zeros(1, z.shape[1], 2 * multiple // f, right)).shape[3]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            return f"enable_tiling() fails ({first_line(error)}): {advice}."
    if (found, decoded) == (right, width):
        return ""
    return (
        f"enable_tiling() moves the tiles: {width} pixels become {found} latent positions "
        f"(should be {right}), and {right} positions become {decoded} pixels: {advice}."
    )


def own_tile(net: Any) -> int:
    """Return the side in pixels of the tiles that `enable_tiling()` uses."""
    side = getattr(net, "tile_sample_min_size", None)
    if side is None:
        side = net.tile_sample_min_width
    return side if isinstance(side, int) else max(side)
