"""How much the posterior may say: KL warm-up, free bits, a target capacity; and which channels say
anything.

Schedules are functions of the update, which the loop evaluates. The KLs here are nats per image and
take the place of the plain mean KL in the loss. Bits are per latent element, as in the log's
`latent/kl_bits_per_element`, so none depends on the resolution. Where a term is not linear in the
KL, its bend is decided by the mean over all ranks: two ranks equal one with the joined batch.

`B` batch, `d` latent channels, `h w` latent space.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentvae.distributed import all_reduce_mean
from latentvae.moments import RunningMoments

ACTIVE_VARIANCE = 0.01  # of the posterior mean (Burda et al. 2016, arXiv:1509.00519)
SILENT_KL = (
    0.01  # nats per element; the epsilon of a collapse (Lucas et al. 2019, arXiv:1911.02469)
)


def kl_warmup(update: int, warmup_updates: int) -> float:
    """Factor on the KL's weight in update ``update`` (from 0): from 0 linearly to 1 at
    ``warmup_updates`` (Sonderby et al. 2016, arXiv:1602.02282)."""
    return min(update / warmup_updates, 1.0) if warmup_updates else 1.0


def capacity(update: int, *, target: float, growth_updates: int) -> float:
    """Capacity C in update ``update`` (from 0): from 0 linearly to ``target`` at
    ``growth_updates`` (Burgess et al. 2018, arXiv:1804.03599)."""
    return target * kl_warmup(update, growth_updates)


def free_bits_kl(kl_per_channel: Tensor, *, bits: float, positions: int) -> Tensor:
    """sum_j max(lambda, E[KL_j]) over channels j (Kingma et al. 2016, arXiv:1606.04934, eq. 15):
    a channel below lambda is not pushed further down.

    Args:
        kl_per_channel: (B, d), nats, summed over positions.
        bits: lambda, in bits per latent element.
        positions: h * w.

    Returns:
        Scalar, nats per image. The mean over the batch is that of one micro-step on all ranks.
    """
    floor = bits * math.log(2.0) * positions
    local = kl_per_channel.float().mean(0)  # (d,)
    above = all_reduce_mean(local) > floor
    return torch.where(above, local, floor).sum()


def capacity_kl(kl: Tensor, *, bits: float, elements: int) -> Tensor:
    """|E[KL] - C| (arXiv:1804.03599, eq. 8): the KL is drawn to C from either side.

    Args:
        kl: (B,), nats per image.
        bits: C now, in bits per latent element.
        elements: d * h * w.

    Returns:
        Scalar, nats per image; its mean over ranks is the value for the joined batch.
    """
    target = bits * math.log(2.0) * elements
    local = kl.float().mean()
    side = torch.sign(all_reduce_mean(local) - target)
    return side * (local - target)


def silent_channels(kl_per_channel: Tensor, *, positions: int) -> Tensor:
    """How many channels have a KL of less than `SILENT_KL` per element in the mean of a batch.

    Args:
        kl_per_channel: (B, d), nats, summed over positions.
        positions: h * w.

    Returns:
        Scalar from 0 to d, float32.
    """
    return (kl_per_channel.float().mean(0) < SILENT_KL * positions).sum().float()


class ActiveUnits:
    """Counts the channels whose posterior mean varies over images and positions, in a window of
    updates: variance above 0.01 (arXiv:1509.00519, section 5.4).

    Sums stay on the device; one host sync in `count`.

    Args:
        num_channels: d.
        device: where the latents are.
        saved: `state()` of an earlier window, of this rank.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        device: torch.device | str = "cpu",
        saved: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self._empty = partial(RunningMoments, num_channels, device=device)
        self._moments = self._empty()
        if saved:
            counts, mean, squares = (np.asarray(row) for row in saved)
            self._moments.load_state_dict({"count": counts[0], "mean": mean, "scatter": squares})

    def add(self, mean: Tensor) -> None:
        """Take in the posterior means of a batch, (B, d, h, w)."""
        self._moments.update(mean, axis=1)

    def count(self) -> int | None:
        """Active channels over all ranks; empties the window. All ranks call it.

        Returns:
            0 to d. None if nothing was added, or something that is not finite.
        """
        moments, self._moments = self._moments.joined(), self._empty()
        if moments.count == 0 or moments.mean.isnan().any():
            return None
        return int((moments.variance(correction=0) > ACTIVE_VARIANCE).sum())

    def state(self) -> list[list[float]]:
        """Count, mean and summed squares about it, d numbers each."""
        moments = self._moments
        counts = [float(moments.count)] * moments.num_features
        return [counts, moments.mean.tolist(), moments.scatter.tolist()]
