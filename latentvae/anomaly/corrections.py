"""Correct the too high log-likelihoods of simple images that are unlike the training images.

A likelihood model of photos gives plain images a higher likelihood than its own training images
(arXiv:1810.09136). The likelihood ratio and the input complexity subtract the log-likelihood of a
more general model (a background model or a codec):

    likelihood ratio    log p(x) - log p_background(x)       arXiv:1906.02845
    input complexity    log p(x) + L(x) log 2                arXiv:1909.11480 (its score S is the
                                                             negative of this sum)

`L(x)` is the size in bits of the image under a lossless codec. Both corrected log-likelihoods are
larger for images that are more like the training images.

Symbols: `N` images, `C` channels, `H W` pixels.
"""

import io
import math
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from latentvae.errors import UserError
from latentvae.pictures import to_uint8

Codec = Literal["png", "webp"]
CODECS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "optimize": True},
    "webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 4},
}


def likelihood_ratio(
    log_likelihood: np.ndarray | Tensor, background: np.ndarray | Tensor
) -> np.ndarray:
    """Return log p(x) - log p_background(x) of each image in nats, (N,).

    The result is larger for images that are more like the training images.

    The background model learns colours and textures but not what the images show, because some
    pixels of its training images have random values (`latentvae train-vae --perturb_rate 0.2`).

    Args:
        log_likelihood: log-likelihood of each image under the model, in nats, (N,).
        background: log-likelihood of each image under the background model, in nats, (N,).

    Raises:
        UserError: the shapes differ, or a value is not finite.
    """
    own, other = _checked(log_likelihood, "log_likelihood"), _checked(background, "background")
    if own.shape != other.shape:
        raise UserError(
            "the model and the background model need the same images, but there are "
            f"{len(own)} and {len(other)} values."
        )
    return own - other


def input_complexity(log_likelihood: np.ndarray | Tensor, bits: np.ndarray | Tensor) -> np.ndarray:
    """Return log p(x) + L(x) log 2 of each image in nats, (N,).

    L(x) is the size in bits of the image under a lossless codec. The log-likelihood must come from
    a probability of 8-bit pixels, not from a density, so that log p(x) and L(x) log 2 have the same
    unit. For a density of pixels in [0, 1], first subtract C H W log 256 from the log-likelihood.

    Args:
        log_likelihood: log-likelihood of each image, in nats, (N,).
        bits: size of each image in bits, see `lossless_bits`, (N,).

    Raises:
        UserError: the shapes differ, a value is not finite, or a size is negative.
    """
    own, size = _checked(log_likelihood, "log_likelihood"), _checked(bits, "bits")
    if own.shape != size.shape:
        raise UserError(
            f"log_likelihood and bits need the same images, but there are {len(own)} and "
            f"{len(size)} values."
        )
    if (size < 0).any():
        raise UserError(f"sizes in bits are at least 0 (got {size.min():g}).")
    return own + math.log(2) * size


def lossless_bits(images: Tensor, *, codec: Codec = "png", headerless: bool = True) -> np.ndarray:
    """Return the size of each image in bits under a lossless codec, (N,).

    Args:
        images: (N, C, H, W) in [-1, 1]. Pixels are rounded to 8 bits.
        codec: "png" or "webp".
        headerless: subtract the size of a file with one black pixel, which is about the size of the
            file's header. For images of 28 or 32 pixels a side, the header would be a large part of
            the file.

    Raises:
        UserError: `codec` is unknown, or the images have the wrong shape.
    """
    if codec not in CODECS:
        raise UserError(f"codec must be one of {', '.join(CODECS)} (got '{codec}').")
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise UserError(f"images are (N, 1 | 3 | 4, H, W), not {tuple(images.shape)}.")
    empty = _size(np.zeros((1, 1, images.shape[1]), np.uint8), codec) if headerless else 0
    return np.array([8.0 * max(_size(i, codec) - empty, 0) for i in to_uint8(images)])


def _size(pixels: np.ndarray, codec: str) -> int:
    """Return the size in bytes of a file that holds pixels (H, W, C), uint8."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    file = io.BytesIO()
    picture.save(file, **CODECS[codec])
    return len(file.getvalue())


def _checked(values: np.ndarray | Tensor, name: str) -> np.ndarray:
    plain = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    array = np.asarray(plain, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise UserError(f"{name} needs one finite value per image, (N,), not {array.shape}.")
    return array
