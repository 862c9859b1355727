"""Check whether a network works in half precision and in tiles.

The results of both checks are called the network's passport.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentvae.evaluation.tiling_check import TilingCheck, can_tile, check_tiling
from latentvae.export.half_precision import (
    FLOAT16_MAX,
    LATENTS,
    MARGIN,
    RECONSTRUCTION,
    HalfPrecision,
    check_precisions,
)
from latentvae.export.tiles import misfit_of_tiles
from latentvae.models import Network

NUM_LAYERS = 10


def passport(
    net: Network, images: Sequence[Tensor], *, f: int, for_tiling: Sequence[Tensor] | None = None
) -> dict[str, Any]:
    """Run a network in half precision and in tiles, and return how its images change.

    The results are plain Python values. Some numbers may be infinite (PSNR of equal images).

    Args:
        net: any diffusers autoencoder, float32, in eval mode.
        images: batches (B, C, H, W) in [-1, 1], on the network's device. `f` divides the sides.
        f: pixels on a side of one latent position.
        for_tiling: other (such as larger) images for the tiling check. None uses `images`.

    Returns:
        `precision` by dtype, `max_activation`, `layers` (the layers with the largest activations),
        `tiling`, and `warnings` (sentences). A check for which there are no images is left out.

    Raises:
        ValueError: reconstructions are not finite in float32.
    """
    for_tiling = images if for_tiling is None else for_tiling
    found: dict[str, Any] = {"warnings": []}

    # half precision
    if images:
        float16, bfloat16 = check_precisions(net, images, dtypes=(torch.float16, torch.bfloat16))
        found["precision"] = {"float16": _verdict(float16), "bfloat16": _verdict(bfloat16)}
        found["max_activation"] = float16.max_activation
        found["layers"] = _largest(float16.layers)
        found["warnings"] += [*_float16_warnings(float16), *_bfloat16_warnings(bfloat16)]

    # tiles
    if for_tiling:
        tiling = check_tiling(net, for_tiling, f=f)
        supported, misfit = can_tile(net, f=f), misfit_of_tiles(net, f=f)
        found["tiling"] = {
            "supported": supported,
            **({"fits": not misfit} if supported else {}),
            **(tiling.to_dict() if tiling else {}),
        }
        found["warnings"] += [*([misfit] if misfit else []), *_tiling_warnings(tiling)]
    return found


def _verdict(check: HalfPrecision) -> dict[str, Any]:
    """Return the result of a precision check as plain values.

    `psnr` and `psnr_cost` are None if the reconstructions are not finite.
    """
    finite = not math.isnan(check.psnr)
    return {
        "safe": check.safe,
        "finite": finite,
        "psnr": check.psnr if finite else None,
        "psnr_cost": check.psnr_cost if finite else None,
    }


def _largest(layers: dict[str, float]) -> dict[str, float]:
    """Return the `NUM_LAYERS` layers with the largest outputs, by name.

    A block is left out if one of its submodules has the same largest output.
    """

    def is_part(name: str, whole: str) -> bool:
        return whole in (LATENTS, RECONSTRUCTION) or name.startswith(f"{whole}.")

    own = {
        whole: peak
        for whole, peak in layers.items()
        if not any(n != whole and layers[n] == peak and is_part(n, whole) for n in layers)
    }
    return dict(sorted(own.items(), key=lambda item: -item[1])[:NUM_LAYERS])


def _float16_warnings(check: HalfPrecision) -> list[str]:
    if check.safe:
        return []
    peak = f"the output of {check.largest_layer} reaches {check.max_activation:.4g}"
    if check.max_activation > FLOAT16_MAX:
        return [f"float16 overflows: {peak}, above float16's maximum {FLOAT16_MAX:.0f}"]
    if check.max_activation * MARGIN > FLOAT16_MAX:
        margin = f"less than a factor {MARGIN:.0f} below float16's maximum {FLOAT16_MAX:.0f}"
        return [f"float16 is not safe: {peak}, {margin}"]
    return [f"float16 is not safe: the reconstructions {_close(check)}"]


def _bfloat16_warnings(check: HalfPrecision) -> list[str]:
    if check.safe:
        return []
    return [f"bfloat16 loses quality: the reconstructions {_close(check)}"]


def _close(check: HalfPrecision) -> str:
    if math.isnan(check.psnr):
        return "are not finite"
    return (
        f"have {check.psnr:.1f} dB PSNR against those of float32, and {check.psnr_cost:.2f} dB "
        "less PSNR against the images"
    )


def _tiling_warnings(check: TilingCheck | None) -> list[str]:
    if check is None or not check.seam_visible:
        return []
    return [f"tiles leave visible seams: a step of {check.seam:.1f} of 255 levels at tile borders"]
