"""Draw how each dimension of a code changes the image.

    save_traversal(decode, mean, Path("traversal.png"), kl=kl_per_dimension)

`save_traversal` writes a grid of images with one row per dimension, sorted by KL. Along a row, the
value of the dimension goes from -2 to 2.

`D` dimensions of a code, `R` rows, `V` values in a row, `C` image channels, `H W` image size.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.pictures import save_grid

Decode = Callable[[Tensor], Tensor]
VALUES = torch.linspace(-2.0, 2.0, 9).tolist()


@torch.no_grad()
def traverse(
    decode: Decode,
    mean: Tensor,
    *,
    dimensions: Sequence[int],
    values: Sequence[float] = VALUES,
) -> Tensor:
    """Return decoded images in which one dimension of a code takes each of the values in turn.

    Args:
        decode: function from codes (N, D) to images (N, C, H, W) in [-1, 1].
        mean: (D,), the code of an image. In each row, all dimensions but one keep the values of
            `mean`.
        dimensions: the dimensions, one for each row.
        values: the values, one for each column, in standard deviations of the prior N(0, 1).

    Returns:
        (R, V, C, H, W).

    Raises:
        UserError: `mean` is not (D,), the code has no dimension of a given number, or `dimensions`
            or `values` is empty.
    """
    _check(mean, dimensions, values)

    columns = torch.tensor(list(values)).to(mean)
    rows = []
    for number in dimensions:
        codes = mean.repeat(len(columns), 1)
        codes[:, number] = columns
        rows.append(decode(codes))
    return torch.stack(rows)


def save_traversal(
    decode: Decode,
    mean: Tensor,
    path: Path,
    *,
    kl: Tensor | None = None,
    dimensions: Sequence[int] | None = None,
    values: Sequence[float] = VALUES,
) -> list[int]:
    """Write a PNG with one row per dimension, and return the dimensions in the order of the rows.

    Args:
        decode: function from codes (N, D) to images (N, C, H, W) in [-1, 1].
        mean: (D,), the mean of an image's posterior.
        path: the PNG.
        kl: (D,), mean KL of each dimension in nats, which the labels show. The row with the
            largest KL is at the top. A dimension with a KL near 0 changes nothing in the image.
        dimensions: the dimensions to draw. None means all dimensions.
        values: the values, one for each column.

    Raises:
        UserError: as in `traverse`, or if `kl` does not have one value per dimension.
    """
    if kl is not None and kl.shape != mean.shape:
        raise UserError(
            f"kl must have one value per dimension of the code, {mean.numel()} (got shape "
            f"{tuple(kl.shape)})."
        )
    order = list(range(mean.numel())) if dimensions is None else list(dimensions)
    _check(mean, order, values)
    labels = [f"z{number}" for number in range(len(mean))]
    if kl is not None:
        order.sort(key=lambda number: -kl[number].item())
        labels = [f"z{number}  {nats:.2f} nats" for number, nats in enumerate(kl.tolist())]

    images = traverse(decode, mean, dimensions=order, values=values)
    rows = [labels[number] for number in order]
    save_grid(images.flatten(0, 1).float().cpu(), path, labels=rows)
    return order


def _check(mean: Tensor, dimensions: Sequence[int], values: Sequence[float]) -> None:
    if mean.ndim != 1:
        raise UserError(
            f"a traversal needs the code of one image, of the shape (D,) (got {tuple(mean.shape)})."
        )
    wrong = [number for number in dimensions if not 0 <= number < len(mean)]
    if wrong or not dimensions or not values:
        raise UserError(
            f"a traversal needs dimensions from 0 to {len(mean) - 1}, and at least one value (got "
            f"dimensions {list(dimensions)} and {len(values)} values)."
        )
