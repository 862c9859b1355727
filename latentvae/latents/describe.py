"""Collect everything that determines the bytes of shards, before the first image is read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.errors import UserError, nearest
from latentvae.latents.formats.shards import (
    LATENT_ORDER,
    LEVEL_ORDER,
    TOKEN_ORDER,
    Content,
    Normalization,
    index_dtype,
)
from latentvae.models import calls

LATENT_DTYPES = ("float16", "bfloat16", "float32")


def describe(
    model: Autoencoder,
    *,
    resolution: int | tuple[int, int],
    interpolation: str,
    value_range: tuple[float, float] | None,
    ignore_icc: bool,
    max_pixels: int | None,
    flip: bool,
    shard_items: int,
    dtype: str | None,
    moments: bool,
    num_items: int,
    data_sha256: str,
    class_names: list[str] | None,
    labels: bool,
    captions: bool,
) -> Content:
    """Return the `Content` of a folder of shards: everything that determines its files.

    The items are tokens if the model is a tokenizer, else latents.

    Raises:
        UserError: an option is wrong, or the model does not support an option.
    """
    _check_options(model, shard_items=shard_items, dtype=dtype, moments=moments)
    tokens = model.num_codes is not None
    norm = model.normalization
    shape = _item_shape(model, resolution, moments=moments)
    levels = _levels(model, shape)

    return Content.model_validate(
        {
            # the items
            "kind": "tokens" if tokens else "latents",
            "dtype": index_dtype(model.num_codes or 0) if tokens else dtype or "float16",
            "item_shape": shape,
            "order": LEVEL_ORDER if levels else TOKEN_ORDER if tokens else LATENT_ORDER,
            "num_codes": model.num_codes,
            "levels": levels,
            "moments": moments,
            "normalization": None
            if tokens
            else Normalization(mean=_list(norm.mean), scale=_list(norm.scale), fold=norm.fold),
            # the model
            "model_class": type(model.net).__name__,
            "model_sha256": model.info()["weights_sha256"],
            "f": model.f,
            "optimize": None if model.optimization.mode == "stock" else model.optimization.mode,
            # the images
            "image_channels": model.image_channels,
            "value_range": value_range,
            "ignore_icc": ignore_icc,
            "max_pixels": max_pixels,
            "resolution": resolution,
            "interpolation": interpolation,
            "flip": flip,
            "num_source_items": num_items,
            "data_sha256": data_sha256,
            "labels": labels,
            "class_names": class_names,
            "captions": captions,
            "shard_items": shard_items,
        }
    )


def _check_options(
    model: Autoencoder, *, shard_items: int, dtype: str | None, moments: bool
) -> None:
    if shard_items < 1:
        raise UserError(f"shard_items must be at least 1 (got {shard_items}).")
    if model.num_codes is not None and (dtype is not None or moments):
        raise UserError(
            f"'{model.name}' is a tokenizer: tokens always take the smallest integer type. "
            "Leave out dtype and moments."
        )
    if dtype is not None and dtype not in LATENT_DTYPES:
        known = ", ".join(LATENT_DTYPES)
        raise UserError(
            f"dtype must be one of {known} (got '{dtype}'){nearest(dtype, LATENT_DTYPES)}"
        )


def check_resolution(model: Autoencoder, resolution: int | Sequence[int]) -> int | tuple[int, int]:
    """Check the resolution of the images to encode. Return the side of a square or (height, width).

    An image with a side that is no multiple of the downsampling factor would be padded, and its
    latent would partly describe the padding.

    Raises:
        UserError: `resolution` is not one or two numbers, a side is no multiple of the model's
            downsampling factor (for FLUX.2, of twice this factor), or the model only takes images
            of another size.
    """
    # one or two sides
    sides = (resolution,) if isinstance(resolution, int) else tuple(resolution)
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2:
        raise UserError(f"resolution must be one number, or height and width (got {sides}).")

    # multiples of the model's factor
    multiple = model.f * model.normalization.fold
    for side in sides:
        if side < multiple:
            raise UserError(
                f"resolution must be at least {multiple}, the pixels of one latent position of "
                f"'{model.name}' (got {side}). Give {multiple} or a multiple of it."
            )
        if side % multiple:
            low = side // multiple * multiple
            raise UserError(
                f"resolution {side} is not a multiple of {multiple}, as '{model.name}' needs. "
                f"The nearest multiples are {low} and {low + multiple}."
            )

    # models of one size
    if model.fixed_size is not None and set(sides) != {model.fixed_size}:
        raise UserError(
            f"'{model.name}' takes {model.fixed_size} x {model.fixed_size} images only (got "
            f"{' x '.join(map(str, sides))}). Give resolution {model.fixed_size}."
        )
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def _item_shape(
    model: Autoencoder, resolution: int | tuple[int, int], *, moments: bool
) -> tuple[int, ...]:
    """Encode a grey image, and return the shape of its tokens or its latent."""
    sides = (resolution,) * 2 if isinstance(resolution, int) else resolution
    grey = torch.zeros(1, model.image_channels, *sides)
    if model.num_codes is not None:
        return tuple(model.encode_tokens(grey).shape[1:])
    mean, logvar = model.encode_posterior(grey)
    if moments and logvar is None:
        raise UserError(
            f"'{model.name}' has no posterior, so it has no standard deviations. Leave out moments."
        )
    return tuple(mean.shape[1:])


def _levels(model: Autoencoder, item_shape: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """Return the size (h, w) of each level, coarsest first, or None if all have the same size."""
    codes = calls.codes(model.net)
    if codes is None or codes.maps == 1:
        return None
    return codes.map_sizes(item_shape[-2], item_shape[-1])


def _list(values: Tensor) -> list[float]:
    return values.detach().cpu().double().flatten().tolist()
