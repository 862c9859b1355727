"""Walk through the latent space of any autoencoder: between images, and along directions.

    model = latentvae.load("runs/first/export")
    first, second = model.encode([photo_a, photo_b], scaled=True)
    steps = slerp(first, second, torch.linspace(0, 1, 7))
    model.decode(steps, scaled=True, output_type="pil")

All functions take latents of any shape: (d, h, w) or a flat code. Use scaled latents
(`scaled=True`), whose elements have a standard deviation near 1. In unscaled latents, a mean far
from 0 changes the angles between latents.

`N` latents, `S` steps or strengths, `R` directions, `...` the shape of one latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentvae.errors import UserError

Kind = Literal["linear", "spherical"]


def lerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return S latents on the straight line between two latents, (S, ...).

    Weight 0 gives exactly `first`, and weight 1 gives exactly `second`.

    Args:
        first: (...), a latent.
        second: (...), another latent.
        weights: the weight of `second` for each of the S latents, (S,).

    Raises:
        UserError: the latents have different shapes.
    """
    _check_alike(first, second)
    weights = _column(weights, first)
    return (1 - weights) * first + weights * second


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return S latents on the arc around zero between two latents, (S, ...).

    Weight 0 gives `first`, and weight 1 gives `second`.

    The direction turns at constant speed (Shoemake 1985), and the norm changes linearly. So latents
    between two typical samples of a Gaussian have the norm of typical samples. On a straight line
    (`lerp`), the latents between two samples have a smaller norm. If a latent is 0, or if both
    latents have almost the same direction, the result is that of `lerp`.

    Args:
        first: (...), a latent.
        second: (...), another latent.
        weights: the position of each of the S latents on the arc, from 0 to 1, (S,).

    Raises:
        UserError: the latents have different shapes, or opposite directions, between which there
            are many arcs.
    """
    _check_alike(first, second)
    a, b = first.float().flatten(), second.float().flatten()
    norms = torch.stack([a.norm(), b.norm()])
    if not norms.all():
        return lerp(first, second, weights)  # zero has no direction

    u, v = a / norms[0], b / norms[1]
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())  # exact also for small angles
    if angle > torch.pi - 1e-3:
        raise UserError(
            "the two latents have opposite directions, so no arc between them is the shortest. Use "
            "linear interpolation."
        )
    if angle < 1e-3:
        return lerp(first, second, weights)

    t = weights.to(a)[:, None]
    directions = torch.sin((1 - t) * angle) * u + torch.sin(t * angle) * v
    points = directions / torch.sin(angle) * ((1 - t) * norms[0] + t * norms[1])
    points = torch.where(t == 0, a, torch.where(t == 1, b, points))
    return points.to(first.dtype).unflatten(1, first.shape)


INTERPOLATIONS: dict[Kind, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lerp,
    "spherical": slerp,
}


def nearest_latents(
    queries: Tensor, latents: Tensor, *, count: int, center: bool = True
) -> tuple[Tensor, Tensor]:
    """Return cosine similarities and indices of the latents nearest to each query, (Q, count) each.

    Args:
        queries: Q latents, (Q, ...).
        latents: the latents among which neighbours are searched, (N, ...). A query that is also in
            `latents` is its own nearest neighbour.
        count: number of neighbours, at most N.
        center: subtract the mean of `latents` from all queries and latents before they are
            compared. Without this step, latents with a mean far from 0 all point in similar
            directions.

    Raises:
        UserError: the shapes differ, or `count` is wrong.
    """
    if queries.shape[1:] != latents.shape[1:]:
        raise UserError(
            "queries and latents must have the same shape after the first dimension (got "
            f"{tuple(queries.shape)} and {tuple(latents.shape)})."
        )
    if not 1 <= count <= len(latents):
        raise UserError(f"the number of neighbours must lie in 1..{len(latents)} (got {count}).")

    rows, found = (part.float().flatten(1) for part in (queries, latents))
    middle = found.mean(0) if center else torch.zeros_like(found[0])
    rows, found = (torch.nn.functional.normalize(part - middle) for part in (rows, found))
    similarity, numbers = (rows @ found.T).topk(count)
    return similarity, numbers


@dataclass(frozen=True)
class Attribute:
    """A direction of the latent space along which images gain an attribute, such as a smile.

    Attributes:
        direction: (...), the mean latent of images with the attribute, minus the mean latent of
            images without it.
        middle: (...), the point half-way between the mean latents with and without the attribute.
    """

    direction: Tensor
    middle: Tensor

    def apply(self, latent: Tensor, strengths: Tensor) -> Tensor:
        """Move a latent, (...), along `direction` by each of S strengths, and return (S, ...).

        With strength 1, a latent moves by the difference of the mean latents with and without the
        attribute. Negative strengths remove the attribute.
        """
        return move_along(latent, self.direction[None], strengths)[0]

    def scores(self, latents: Tensor) -> Tensor:
        """Return the attribute's score (N,) of each of the latents (N, ...).

        The mean latent with the attribute has the score 0.5, and the mean latent without the
        attribute has the score -0.5.
        """
        axis = self.direction.float().flatten()
        return (latents - self.middle).float().flatten(1) @ axis / axis.square().sum()


def attribute_direction(present: Tensor, absent: Tensor) -> Attribute:
    """Return the direction from the mean of `absent` to the mean of `present`.

    The two groups of images should differ in the attribute only. Otherwise the direction also
    contains other differences between the groups, such as the background. The result is best if
    objects are at the same place in all images.

    Args:
        present: (N, ...), latents of images with the attribute.
        absent: (M, ...), latents of images without the attribute.

    Raises:
        UserError: a group is empty, the shapes differ, or both groups have the same mean.
    """
    if not len(present) or not len(absent) or present.shape[1:] != absent.shape[1:]:
        raise UserError(
            "an attribute needs two groups of latents of one shape (got "
            f"{tuple(present.shape)} and {tuple(absent.shape)})."
        )
    means = present.mean(0), absent.mean(0)
    direction = means[0] - means[1]
    if not direction.any():
        raise UserError("the two groups have the same mean, so there is no direction.")
    return Attribute(direction, (means[0] + means[1]) / 2)


@dataclass(frozen=True)
class Components:
    """The principal components of latents, the largest first.

    Attributes:
        directions: (R, ...), each as long as one standard deviation of the latents along this
            direction.
        shares: (R,), the fraction of the latents' total variance along each direction.
    """

    directions: Tensor
    shares: Tensor


def principal_components(latents: Tensor, *, count: int) -> Components:
    """Return the `count` directions of the largest variance of N latents (N, ...).

    There are at most as many directions as a latent has elements. The sign of a direction is chosen
    so that its element with the largest absolute value is positive.

    Raises:
        UserError: `count` is not in 1..N - 1, or all latents are equal.
    """
    if not 1 <= count < len(latents):
        raise UserError(
            f"{len(latents)} latents have 1 to {len(latents) - 1} principal components (got count "
            f"{count})."
        )
    rows = latents.float().flatten(1)
    _, values, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    if not values.any():
        raise UserError("all latents are equal, so they have no principal components.")
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    std = values / (len(rows) - 1) ** 0.5
    directions = axes * largest.sign() * std[:, None]
    shares = values.square() / values.square().sum()
    return Components(directions[:count].unflatten(1, latents.shape[1:]), shares[:count])


def move_along(latent: Tensor, directions: Tensor, strengths: Tensor) -> Tensor:
    """Move a latent, (...), by each of S strengths along each of R directions: (R, S, ...).

    Raises:
        UserError: the directions have another shape than the latent.
    """
    if directions.shape[1:] != latent.shape:
        raise UserError(
            f"directions of the shape {tuple(directions.shape)} do not fit a latent of the shape "
            f"{tuple(latent.shape)}."
        )
    steps = _column(strengths, latent) * directions[:, None]
    return (latent + steps).to(latent.dtype)


def _column(values: Tensor, latent: Tensor) -> Tensor:
    """Reshape values (S,) to (S, 1, ..., 1), to broadcast them over the axes of a latent."""
    return values.to(latent).view(-1, *[1] * latent.ndim)


def _check_alike(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise UserError(
            f"latents of one shape are needed (got {tuple(first.shape)} and {tuple(second.shape)})."
        )
