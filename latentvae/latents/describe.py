"""The content of an encoding, found out before the first image is read."""

import torch
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.errors import UserError, nearest
from latentvae.latents.formats.shards import (
    LATENT_ORDER,
    TOKEN_ORDER,
    Content,
    Normalization,
    index_dtype,
)

LATENT_DTYPES = ("float16", "bfloat16", "float32")


def describe(
    model: Autoencoder,
    *,
    resolution: int,
    interpolation: str,
    value_range: tuple[float, float] | None,
    ignore_icc: bool,
    shard_items: int,
    dtype: str | None,
    moments: bool,
    num_items: int,
    data_sha256: str,
    class_names: list[str] | None,
    labels: bool,
) -> Content:
    """Return the content of a folder of shards.

    A tokenizer gives tokens, any other autoencoder latents.

    Raises:
        UserError: a resolution, type or option that this model cannot take.
    """
    _check_options(
        model, resolution=resolution, shard_items=shard_items, dtype=dtype, moments=moments
    )
    tokens = model.num_codes is not None
    norm = model.normalization

    return Content.model_validate(
        {
            # what an item is
            "kind": "tokens" if tokens else "latents",
            "dtype": index_dtype(model.num_codes or 0) if tokens else dtype or "float16",
            "item_shape": _item_shape(model, resolution, moments=moments),
            "order": TOKEN_ORDER if tokens else LATENT_ORDER,
            "num_codes": model.num_codes,
            "moments": moments,
            "normalization": None
            if tokens
            else Normalization(mean=_list(norm.mean), scale=_list(norm.scale), fold=norm.fold),
            # what makes it
            "model_class": type(model.net).__name__,
            "model_sha256": model.info()["weights_sha256"],
            "f": model.f,
            "optimize": None if model.optimization.mode == "stock" else model.optimization.mode,
            # of which images
            "image_channels": model.image_channels,
            "value_range": value_range,
            "ignore_icc": ignore_icc,
            "resolution": resolution,
            "interpolation": interpolation,
            "num_source_items": num_items,
            "data_sha256": data_sha256,
            "labels": labels,
            "class_names": class_names,
            "shard_items": shard_items,
        }
    )


def _check_options(
    model: Autoencoder, *, resolution: int, shard_items: int, dtype: str | None, moments: bool
) -> None:
    if shard_items < 1:
        raise UserError(f"shard_items must be at least 1 (got {shard_items}).")
    if resolution < model.f:
        raise UserError(
            f"resolution must be at least {model.f}, the pixels of one latent position of "
            f"'{model.name}' (got {resolution})."
        )
    if model.num_codes is not None and (dtype is not None or moments):
        raise UserError(
            f"'{model.name}' is a tokenizer: its indices take the smallest integer type. "
            "Leave out dtype and moments."
        )
    if dtype is not None and dtype not in LATENT_DTYPES:
        known = ", ".join(LATENT_DTYPES)
        raise UserError(
            f"dtype must be one of {known} (got '{dtype}'){nearest(dtype, LATENT_DTYPES)}"
        )


def _item_shape(model: Autoencoder, resolution: int, *, moments: bool) -> tuple[int, ...]:
    """Return the shape that one grey image gives."""
    grey = torch.zeros(1, model.image_channels, resolution, resolution)
    if model.num_codes is not None:
        return tuple(model.encode_tokens(grey).shape[1:])
    mean, logvar = model.encode_posterior(grey)
    if moments and logvar is None:
        raise UserError(
            f"'{model.name}' has no posterior, so it has no standard deviations. Leave out moments."
        )
    return tuple(mean.shape[1:])


def _list(values: Tensor) -> list[float]:
    return values.detach().cpu().double().flatten().tolist()
