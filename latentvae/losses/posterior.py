"""Count latent channels that carry information (active), and those with almost none (silent).

`B` batch, `d` latent channels, `h w` latent positions.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentvae.moments import RunningMoments

# Smallest variance of an active channel's posterior mean (Burda et al. 2016, arXiv:1509.00519).
ACTIVE_VARIANCE = 0.01
# A channel with a smaller KL, in nats per element, carries almost no information (is "silent"). The
# number is the epsilon in the definition of posterior collapse (Lucas et al. 2019,
# arXiv:1911.02469).
SILENT_KL = 0.01


def silent_channels(kl_per_channel: Tensor, *, positions: int) -> Tensor:
    """Return how many channels have a mean KL below `SILENT_KL` nats per latent element in a batch.

    Args:
        kl_per_channel: KL of each of d channels in nats, summed over positions, (B, d).
        positions: number of latent positions h * w.

    Returns:
        A scalar from 0 to d, float32.
    """
    return (kl_per_channel.float().mean(0) < SILENT_KL * positions).sum().float()


class ActiveUnits:
    """Counts the active latent channels in a window of updates (arXiv:1509.00519, section 5.4).

    A channel is active if its posterior mean has a variance above 0.01 over images and positions.
    A window is the updates between two calls of `count`. Sums are kept on the latents' device, so
    `add` does not wait for the GPU.

    Args:
        num_channels: number of latent channels d.
        device: device of the latents.
        saved: result of `state()` on this rank, with which a resumed training continues its window.
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
        """Add the posterior means of a batch, (B, d, h, w), to the sums of the current window."""
        self._moments.update(mean, axis=1)

    def count(self) -> int | None:
        """Return the number of active channels over all ranks, and start a new, empty window.

        All ranks must call this method.

        Returns:
            The number of active channels. None if nothing was added, or if a value was not finite.
        """
        moments, self._moments = self._moments.joined(), self._empty()
        if moments.count == 0 or not moments.mean.isfinite().all():
            return None
        return int((moments.variance(correction=0) > ACTIVE_VARIANCE).sum())

    def state(self) -> list[list[float]]:
        """Return the statistics of the current window, three lists with one number per channel.

        The lists are the count, the mean, and the sum of squared deviations from the mean.
        """
        moments = self._moments
        counts = [float(moments.count)] * moments.num_features
        return [counts, moments.mean.tolist(), moments.scatter.tolist()]
