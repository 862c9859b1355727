"""Measure the likelihood of images under a variational autoencoder.

Symbols: `B` batch, `S` samples per image, `G` groups of latents, `U` latent units.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentvae.models.bound import Bound, LikelihoodNet

# Largest number of pixels, over all samples, that the decoder computes at once.
MAX_PIXELS = 2**22
ACTIVE = 0.01  # smallest activity of an active unit, see `Sums.activity`


@dataclass
class Sums:
    """Sums over images. The sums of several processes can be added by `add`.

    Attributes:
        images: number of images.
        elbo, importance: sums of the evidence lower bound and of the importance-weighted bound, in
            nats.
        kl: sum of the KL of each group of latents, (G,), in nats.
        means, squares: sums of the posterior means and of their squares, (U,), or 0.0 if a network
            has no posterior means.
        unit_kl: sum of the KL of each unit, (U,), in nats. None if the KL of units is unknown.
        each: both bounds (evidence and importance-weighted) of each image, (2, B) for each batch.
    """

    images: int = 0
    elbo: float = 0.0
    importance: float = 0.0
    kl: Tensor | float = 0.0
    means: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    unit_kl: Tensor | float | None = None
    each: list[Tensor] = field(default_factory=list)

    def add(self, other: "Sums") -> None:
        """Add the sums of other images."""
        self.images += other.images
        self.elbo += other.elbo
        self.importance += other.importance
        self.kl = self.kl + other.kl
        self.means = self.means + other.means
        self.squares = self.squares + other.squares
        self.each += other.each
        if other.unit_kl is not None:
            self.unit_kl = other.unit_kl if self.unit_kl is None else self.unit_kl + other.unit_kl

    def activity(self) -> Tensor | None:
        """Return the activity of each latent unit, (U,).

        A unit with an activity above 0.01 counts as active. The activity is the variance over
        images of the unit's posterior mean (Burda et al. 2016). If a network has no posterior
        means, the activity is the unit's mean KL in nats. The result is None if neither the
        posterior means nor the KL of units is known.
        """
        if isinstance(self.means, Tensor):
            return self.squares / self.images - (self.means / self.images).square()
        return None if self.unit_kl is None else torch.as_tensor(self.unit_kl) / self.images

    def active_units(self) -> int | None:
        """Return the number of active units, or None if the activity is unknown."""
        activity = self.activity()
        return None if activity is None else int((activity > ACTIVE).sum())


@torch.no_grad()
def bounds_of(
    net: LikelihoodNet,
    images: Tensor,
    *,
    samples: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Sums:
    """Return the sums of the likelihood bounds of a batch.

    To save memory, only a few latent samples are computed at a time.

    Args:
        net: the network, in eval mode.
        images: pixels in [-1, 1], (B, C, H, W).
        samples: S, latent samples per image.
        progress: function that is called each time some samples are computed, with the number of
            these samples.
    """
    pixels, batch = images[0].numel(), len(images)
    at_once = max(MAX_PIXELS // (pixels * batch), 1)
    elbo, log_sum = torch.zeros(batch, dtype=torch.float64), None
    kl: Tensor | float = 0.0
    first: Bound | None = None
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        bound = net(images, samples=count)
        first = bound if first is None else first
        elbo += bound.elbo().double().cpu() * count / samples
        kl = kl + bound.kl.double().mean(1).sum(1).cpu() * count / samples  # (G,)
        part = torch.logsumexp(bound.log_weights().double(), dim=0).cpu()
        log_sum = part if log_sum is None else torch.logaddexp(log_sum, part)
        progress(count)

    assert log_sum is not None and first is not None
    importance = log_sum - math.log(samples)
    means, unit_kl = net.posterior_means(images), first.unit_kl
    means = None if means is None else means.double().cpu()
    return Sums(
        images=batch,
        elbo=elbo.sum().item(),
        importance=importance.sum().item(),
        kl=kl,
        means=0.0 if means is None else means.sum(0),
        squares=0.0 if means is None else means.square().sum(0),
        unit_kl=None if unit_kl is None else unit_kl.double().sum(0).cpu(),
        each=[torch.stack([elbo, importance])],
    )


def total_of(parts: Iterable[Sums]) -> Sums:
    """Return one `Sums` over the images of all `parts`."""
    total = Sums()
    for part in parts:
        total.add(part)
    return total


def bits_per_dim(nats: float, shape: tuple[int, int, int]) -> float:
    """Convert nats per image of shape (C, H, W) to bits per dimension."""
    return nats / (math.prod(shape) * math.log(2.0))
