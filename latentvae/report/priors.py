"""What a latent's bitstream needs to know beforehand, learned from other images than it codes.

The images are dealt into two halves by the parity of their position; those of one half are coded
with the model of the latents and the steps that were fitted on the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.errors import UserError
from latentvae.latents.codec import LatentPrior, channel_gains
from latentvae.models import calls
from latentvae.report.pictures import Pictures
from latentvae.report.plan import Plan

MAX_POSITIONS = 4096  # of one image's latent that the fit looks at
PROBES = 4  # backward passes of one image; steps are kept to 2 percent anyway
GAIN_SIDE = 32  # positions a side of a latent that the decoder's gains are measured on


@dataclass(frozen=True)
class HalfPrior:
    """From one half of the images: the latents' distribution, and the decoder's gains, (d,)."""

    prior: LatentPrior
    gains: Tensor


class Priors:
    """Those of both halves; `other(position)` is the one that a picture is coded with."""

    def __init__(self, halves: tuple[HalfPrior, HalfPrior]) -> None:
        self.halves = halves

    def other(self, position: int) -> HalfPrior:
        return self.halves[1 - position % 2]


@torch.no_grad()
def fit_priors(model: Autoencoder, pictures: Pictures, *, plan: Plan) -> Priors:
    """From at most `plan.prior_images` of each half, evenly spread.

    A single image has no other half: it is coded with what was fitted on itself.
    """
    halves = [_fit(model, pictures, parity, plan) for parity in (0, 1)]
    first, second = (half or halves[1 - i] for i, half in enumerate(halves))
    if first is None or second is None:
        raise UserError("not one image can be read")
    return Priors((first, second))


def _fit(model: Autoencoder, pictures: Pictures, parity: int, plan: Plan) -> HalfPrior | None:
    positions = range(parity, len(pictures), 2)
    samples: list[Tensor] = []
    gains: list[Tensor] = []
    for _, images in pictures.some(plan.prior_images, positions=positions):
        z, _ = model.encode_posterior(images)
        samples.append(_some_positions(z))
        if len(gains) < plan.gain_images:
            side = max(z.shape) if model.fixed_size else GAIN_SIDE
            gains.append(
                channel_gains(lambda y: calls.decode(model.net, y), z, probes=PROBES, max_side=side)
            )
    if not samples:
        return None
    prior = LatentPrior.fit(torch.cat(samples, dim=1))
    return HalfPrior(prior, torch.stack(gains).mean(dim=0))


def _some_positions(z: Tensor) -> Tensor:
    """(1, d, h, w) to (d, n), n at most MAX_POSITIONS, evenly spread."""
    flat = z[0].flatten(1).float().cpu()
    return flat[:, :: max(1, flat.shape[1] // MAX_POSITIONS)]
