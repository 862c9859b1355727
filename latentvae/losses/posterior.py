"""How much the posterior says: which channels say anything.

`B` batch, `d` latent channels, `h w` latent space.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentvae.moments import RunningMoments

ACTIVE_VARIANCE = 0.01  # of the posterior mean (Burda et al. 2016, arXiv:1509.00519)
SILENT_KL = (
    0.01  # nats per element; the epsilon of a collapse (Lucas et al. 2019, arXiv:1911.02469)
)


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
