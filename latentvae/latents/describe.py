"""What an encoding will hold, found out before the first image is read."""

import torch
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.errors import UserError, nearest
from latentvae.latents.shards import (
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
    shard_items: int,
    dtype: str | None,
    moments: bool,
    num_items: int,
    data_sha256: str,
    class_names: list[str] | None,
    labels: bool,
) -> Content:
    """The content of a folder of shards; tokens of a tokenizer, latents of any other autoencoder.

    Raises:
        UserError: a resolution, type or option that this model cannot be given.
    """
    if shard_items < 1:
        raise UserError(f"shard_items is {shard_items}; 1 or more is needed")
    if resolution < model.f:
        raise UserError(
            f"the resolution is {resolution}, smaller than the {model.f} pixels of one position of "
            f"'{model.name}'; {model.f} or more is needed"
        )
    tokens = model.num_codes is not None
    if tokens and (dtype is not None or moments):
        raise UserError(
            f"'{model.name}' is a tokenizer: its indices take the smallest integer type, so dtype "
            "and moments have no meaning"
        )
    if dtype is not None and dtype not in LATENT_DTYPES:
        known = ", ".join(LATENT_DTYPES)
        raise UserError(f"dtype is '{dtype}'; {known} are possible{nearest(dtype, LATENT_DTYPES)}")
    norm = model.normalization
    return Content.model_validate(
        {
            "kind": "tokens" if tokens else "latents",
            "dtype": index_dtype(model.num_codes or 0) if tokens else dtype or "float16",
            "item_shape": _item_shape(model, resolution, moments=moments),
            "order": TOKEN_ORDER if tokens else LATENT_ORDER,
            "num_codes": model.num_codes,
            "moments": moments,
            "normalization": None
            if tokens
            else Normalization(mean=_list(norm.mean), scale=_list(norm.scale), fold=norm.fold),
            "model_class": type(model.net).__name__,
            "model_sha256": model.info()["weights_sha256"],
            "f": model.f,
            "image_channels": model.image_channels,
            "value_range": value_range,
            "resolution": resolution,
            "interpolation": interpolation,
            "num_source_items": num_items,
            "data_sha256": data_sha256,
            "labels": labels,
            "class_names": class_names,
            "shard_items": shard_items,
            "optimize": None if model.optimization.mode == "stock" else model.optimization.mode,
        }
    )


def _item_shape(model: Autoencoder, resolution: int, *, moments: bool) -> tuple[int, ...]:
    """Of what one grey image gives."""
    grey = torch.zeros(1, model.image_channels, resolution, resolution)
    if model.num_codes is not None:
        return tuple(model.encode_tokens(grey).shape[1:])
    mean, logvar = model.encode_posterior(grey)
    if moments and logvar is None:
        raise UserError(
            f"'{model.name}' has no posterior, so it has no standard deviations: leave moments out"
        )
    return tuple(mean.shape[1:])


def _list(values: Tensor) -> list[float]:
    return values.detach().cpu().double().flatten().tolist()
