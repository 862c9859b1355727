"""Bring a network's latents to about unit variance, as its pipelines do.

Most pipelines subtract `shift_factor` and multiply by `scaling_factor`. If a config has
`latents_mean` and `latents_std`, with one value per channel, pipelines compute
(z - latents_mean) * scaling_factor / latents_std instead. If the pipelines of a kind of network
normalise in another way, the subclass of `Family` for this kind of network overrides
`Family.normalization`.

`B` batch, `d` latent channels, `h w` latent positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LatentNormalization:
    """The map (z - mean) * scale, after folding `fold` x `fold` positions into channels.

    Args:
        scaling_factor, shift_factor: values in the model's config, for diffusers' pipelines and for
            reports. `apply` and `invert` use `mean` and `scale` instead.
        mean, scale: one value for each channel of the folded latents, or one value for all
            channels.
        fold: side of the squares of positions that are folded into channels. 1 means no folding.
        applied: whether the network itself normalises its latents. If `applied` is True, `scale` is
            1 and `mean` is 0.
    """

    scaling_factor: float
    shift_factor: float
    mean: Tensor
    scale: Tensor
    fold: int = 1
    applied: bool = False

    def apply(self, z: Tensor) -> Tensor:
        """Normalise latents z (B, d, h, w).

        The result is (B, d * fold ** 2, h / fold, w / fold).
        """
        z = F.pixel_unshuffle(z, self.fold)
        return (z - self._like(self.mean, z)) * self._like(self.scale, z)

    def invert(self, z: Tensor) -> Tensor:
        """Return the latents (B, d, h, w) that `apply` turns into `z`."""
        return F.pixel_shuffle(z / self._like(self.scale, z) + self._like(self.mean, z), self.fold)

    def _like(self, values: Tensor, z: Tensor) -> Tensor:
        return values.to(z.device, z.dtype).view(1, -1, 1, 1)


def from_config(config: Mapping[str, Any]) -> LatentNormalization:
    """Return the normalisation in a network's config.

    If the config has no values for the normalisation, the scale is 1 and the mean is 0.
    """
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return pooled(scale, shift)
    return LatentNormalization(scale, shift, torch.tensor(mean), scale / torch.tensor(std))


def pooled(scale: float, shift: float) -> LatentNormalization:
    """Return the normalisation (z - shift) * scale, whose two values apply to all channels."""
    return LatentNormalization(scale, shift, torch.tensor([shift]), torch.tensor([scale]))
