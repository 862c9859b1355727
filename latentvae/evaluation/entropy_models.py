"""Fit an entropy model to an autoencoder's latents, and measure the gains of its decoder.

A gain says how strongly an error in one latent channel changes the image. The gains set the
quantiser step of each channel.

The images are split into two halves: images at even positions and images at odd positions. The
entropy model and the quantiser steps for one half of the images are fitted on the other half.

`d` latent channels, `h w` latent positions, `n` samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentvae.autoencoder import Autoencoder, NotFiniteError
from latentvae.coding.latent_codec import LatentPrior, channel_gains
from latentvae.errors import UserError
from latentvae.evaluation.picture_source import Pictures
from latentvae.evaluation.saved_progress import Arrays
from latentvae.evaluation.settings import Plan
from latentvae.models import calls

MAX_POSITIONS = 4096  # largest number of positions that the fit uses of one image's latent
# Backward passes per image when the gains are measured. More passes would be useless, because the
# coded file stores the quantiser steps rounded by up to 2 %.
PROBES = 4
GAIN_PIXELS = 256  # side of the image that is decoded with gradients to measure the gains


# Number of elements of the largest latent that stays in memory from the fit to the measurement.
KEPT_ELEMENTS = 2**20

Posterior = tuple[Tensor, Tensor | None]
"""Mean and log-variance of a posterior. For a latent without a posterior: the latent and None."""


@dataclass(frozen=True)
class HalfPrior:
    """The distribution of the latents, and the decoder's gain for each latent channel (d,).

    The distribution and the gains were measured on one half of the images.
    """

    prior: LatentPrior
    gains: Tensor


class Priors:
    """Fits one entropy model on each half of the images, and keeps both models.

    The halves are the images at even and at odd positions.

    `other` returns the entropy model that codes the picture at a given position.

    Attributes:
        own: whether the images of one half are coded with the entropy model of their own half,
            because no entropy model could be fitted on the other half.
    """

    def __init__(self) -> None:
        self.halves: list[HalfPrior] = []
        self.own = False

    def other(self, position: int) -> HalfPrior:
        return self.halves[1 - position % 2]

    @torch.no_grad()
    def fit(
        self, model: Autoencoder, pictures: Pictures, *, plan: Plan, encoded: dict[int, Posterior]
    ) -> None:
        """Fit both entropy models.

        Each model is fitted on at most `plan.prior_images` images of its half, evenly spread.

        Args:
            encoded: a dictionary that this function fills with posteriors of at most
                `KEPT_ELEMENTS` elements, by the image's position. With these posteriors, the later
                measurement does not encode the images again.
        """
        halves = [_fit(model, pictures, parity, plan, encoded) for parity in (0, 1)]
        found = [half for half in halves if half is not None]
        if not found:
            read = list(pictures.some(1))
            if read:
                raise NotFiniteError(model.name, model.net.dtype)
            raise UserError(f"none of the {len(pictures)} images can be read.")
        self.own = len(found) == 1
        self.halves = [half or found[0] for half in halves]

    def state_dict(self) -> Arrays:
        arrays = {"own": np.array(self.own)}
        for number, half in enumerate(self.halves):
            values = {**vars(half.prior), "gains": half.gains}
            arrays |= {f"{number}.{name}": value.numpy() for name, value in values.items()}
        return arrays

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        self.own, self.halves = bool(state["own"]), []
        for number in range(2):
            values = {
                name: torch.from_numpy(state[f"{number}.{name}"])
                for name in ("location", "scale", "gaussian", "gains")
            }
            gains = values.pop("gains")
            self.halves.append(HalfPrior(LatentPrior(**values), gains))


def _fit(
    model: Autoencoder,
    pictures: Pictures,
    parity: int,
    plan: Plan,
    encoded: dict[int, Posterior],
) -> HalfPrior | None:
    positions = range(parity, len(pictures), 2)
    if not positions:
        return None
    samples: list[Tensor] = []
    gains: list[Tensor] = []
    for position, images in pictures.some(plan.prior_images, positions=positions):
        z, logvar = model.encode_posterior(images)
        if z.numel() <= KEPT_ELEMENTS:
            encoded[position] = z, logvar
        samples.append(_some_positions(z))
        if len(gains) < plan.gain_images:
            gains.append(_gains(model, z))
    samples, gains = ([x for x in found if x.isfinite().all()] for found in (samples, gains))
    if not samples or not gains:
        return None
    prior = LatentPrior.fit(torch.cat(samples, dim=1))
    return HalfPrior(prior, torch.stack(gains).mean(dim=0))


def _gains(model: Autoencoder, z: Tensor) -> Tensor:
    side = model.fixed_size or GAIN_PIXELS  # a network of fixed size cannot decode a crop
    return channel_gains(
        lambda y: calls.decode(model.net, y),
        z,
        probes=PROBES,
        max_side=max(side // model.f, 4),
    )


def _some_positions(z: Tensor) -> Tensor:
    """Return the values of a latent (1, d, h, w) at evenly spread positions, as (d, n).

    The number of positions n is at most MAX_POSITIONS.
    """
    flat = z[0].flatten(1).float().cpu()
    return flat[:, :: max(1, -(-flat.shape[1] // MAX_POSITIONS))]
