"""Read the strings that describe the blocks of a hierarchical VAE, in the format of Very Deep VAE.

An encoder is a list such as "32x11,32d2,16x6": 11 blocks at resolution 32, then one block whose
output is pooled by 2, then 6 blocks at resolution 16. A decoder is a list such as "1x1,4m1,4x2":
one block at resolution 1, then one block at resolution 4 that reads the upsampled maps of
resolution 1, then 2 more blocks at resolution 4. Each block of a decoder has a group of latents.
"""

import math
import re
from typing import NamedTuple

from latentvae.errors import UserError

MAX_BLOCKS = 1000

_ITEM = re.compile(r"(\d+)(?:([xdm])(\d+))?")


class Layer(NamedTuple):
    """The place of one block in an encoder or a decoder.

    Attributes:
        resolution: side of the block's maps.
        pool: factor by which the output of an encoder's block is pooled. 1 means no pooling.
        source: resolution of the maps that a decoder's block upsamples and reads, or None.
    """

    resolution: int
    pool: int = 1
    source: int | None = None


def encoder_layers(text: str) -> list[Layer]:
    """Return the blocks of an encoder, finest first.

    Raises:
        UserError: the text has a wrong format, or its resolutions do not fit each other.
    """
    items = _items(text, "enc_blocks", "x, d")
    layers: list[Layer] = []
    side = items[0][1]

    for item, resolution, kind, number in items:
        if resolution != side:
            raise UserError(
                f"enc_blocks has '{item}' where the maps have side {side}. Replace {resolution} "
                f"by {side}, or change the blocks before '{item}'."
            )
        if kind == "d":
            if side % number:
                raise UserError(
                    f"enc_blocks has '{item}', but {number} does not divide {side}. Pool by a "
                    f"divisor of {side}."
                )
            layers.append(Layer(resolution, pool=number))
            side //= number
        else:
            layers += [Layer(resolution)] * number
    return layers


def decoder_layers(text: str) -> list[Layer]:
    """Return the blocks of a decoder, coarsest first.

    Raises:
        UserError: the text has a wrong format, or its resolutions do not fit each other.
    """
    layers: list[Layer] = []

    for item, resolution, kind, number in _items(text, "dec_blocks", "x, m"):
        seen = {layer.resolution for layer in layers}
        if kind == "m":
            if number not in seen or resolution % number or resolution == number:
                earlier = ", ".join(map(str, sorted(seen))) or "none"
                raise UserError(
                    f"dec_blocks has '{item}', which upsamples resolution {number} to {resolution}."
                    f" The number after 'm' must be the resolution of an earlier block ({earlier}) "
                    f"that divides {resolution}."
                )
            layers.append(Layer(resolution, source=number))
        else:
            if layers and resolution not in seen:
                raise UserError(
                    f"dec_blocks has '{item}', but no earlier block has resolution {resolution}. "
                    f"Put '{resolution}m{layers[-1].resolution}' before it."
                )
            layers += [Layer(resolution)] * number

    if (last := layers[-1].resolution) != (finest := max(layer.resolution for layer in layers)):
        raise UserError(
            f"dec_blocks ends at resolution {last}, but the pixels come from the last block. End "
            f"it with a block of its finest resolution, such as '{finest}x1'."
        )
    return layers


def check_blocks(enc_blocks: str, dec_blocks: str, custom_widths: str) -> set[int]:
    """Return the resolutions of a network, after a check that its options fit each other.

    Raises:
        UserError: an option has a wrong format or resolution, the decoder has a resolution that the
            encoder does not have, or the encoder has a coarser resolution than the decoder.
    """
    encoder, decoder = encoder_layers(enc_blocks), decoder_layers(dec_blocks)
    made = {layer.resolution for layer in encoder}
    made |= {layer.resolution // layer.pool for layer in encoder}
    missing = sorted({layer.resolution for layer in decoder} - made)
    if missing:
        raise UserError(
            f"dec_blocks has resolution {missing[0]}, which enc_blocks lacks. The encoder has "
            f"the resolutions {', '.join(map(str, sorted(made)))}."
        )
    if (coarsest := min(made)) < decoder[0].resolution:
        raise UserError(
            f"enc_blocks goes down to resolution {coarsest}, but dec_blocks starts at "
            f"{decoder[0].resolution}, so the last encoder blocks would not learn. Start "
            f"dec_blocks at {coarsest}, or end enc_blocks at {decoder[0].resolution}."
        )
    resolution_widths(custom_widths, 1, made)
    return made


def fit(side: int, *, encoder: int, decoder: int) -> int:
    """Return the side of the images, in pixels, after padding on all edges.

    The result is the smallest common multiple of `encoder` and `decoder` that is at least `side`.
    So each position of the encoder's and the decoder's maps stands for a whole number of pixels.

    Args:
        side: side of the images in pixels.
        encoder: side of the encoder's first maps.
        decoder: side of the decoder's last maps.

    Raises:
        UserError: the padding at an edge would be more than an eighth of the side, or would not be
            a whole number of pixels.
    """
    step = math.lcm(encoder, decoder)
    extra = -side % step
    if extra % 2 or extra > side // 4:
        raise UserError(
            f"enc_blocks starts at resolution {encoder} and dec_blocks ends at {decoder}, which "
            f"does not fit images of side {side}. Each of the two resolutions must divide the side "
            "of the images, or be larger than this side by a small even number."
        )
    return side + extra


def resolution_widths(text: str, default: int, resolutions: set[int]) -> dict[int, int]:
    """Return the number of channels of each resolution.

    Args:
        text: list of RESOLUTION:CHANNELS, such as "64:32,32:64", or "" for the same number of
            channels everywhere.
        default: number of channels of the resolutions that the text does not name.
        resolutions: the resolutions of the network.

    Raises:
        UserError: the text has a wrong format, or names a resolution that the network does not
            have.
    """
    widths = dict.fromkeys(sorted(resolutions), default)

    for item in filter(None, text.split(",")):
        parts = re.fullmatch(r"\s*(\d+):(\d+)\s*", item)
        if parts is None or int(parts[2]) < 1:
            raise UserError(
                f"custom_widths must have items RESOLUTION:WIDTH, such as '32:64,16:128' (got "
                f"'{item}')."
            )
        resolution, width = int(parts[1]), int(parts[2])
        if resolution not in widths:
            raise UserError(
                f"custom_widths names resolution {resolution}, but the network has "
                f"the resolutions {', '.join(map(str, widths))}."
            )
        widths[resolution] = width
    return widths


def _items(text: str, option: str, kinds: str) -> list[tuple[str, int, str, int]]:
    """Return (item, resolution, kind, number) of each item of a list, such as "32x11,32d2".

    The item "32x11" has kind "x" and number 11. "32" is the same as "32x1".
    """
    found: list[tuple[str, int, str, int]] = []
    for item in (part.strip() for part in text.split(",")):
        parts = _ITEM.fullmatch(item)
        if parts is None or (parts[2] and parts[2] not in kinds):
            known = {"x, d": "32x11 or 32d2", "x, m": "4x2 or 8m4"}[kinds]
            raise UserError(
                f"{option} must be a list of items such as {known}, separated by commas (got "
                f"'{item}' in '{text}')."
            )
        resolution, number = int(parts[1]), int(parts[3] or 1)
        if resolution < 1 or number < 1:
            raise UserError(f"{option} needs numbers of 1 or above (got '{item}').")
        found.append((item, resolution, parts[2] or "x", number))
    blocks = sum(number if kind == "x" else 1 for _, _, kind, number in found)
    if blocks > MAX_BLOCKS:
        raise UserError(f"{option} must have at most {MAX_BLOCKS} blocks (got {blocks}).")
    return found
