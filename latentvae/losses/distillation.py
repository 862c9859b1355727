"""The loss of a small autoencoder (student) that learns from a given autoencoder (teacher).

    decoder = (1 - t) * distance(recon, images) + t * distance(recon, teacher's recon)
    distance = pixel error + perceptual_scale * LPIPS
    encoder = mean squared error of the latents
    total = decoder + latent_scale * encoder

`t` is `teacher_share`. `B` batch, `C` image channels, `H W` pixels, `d h w` latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentvae.losses.colors import to_rgb
from latentvae.losses.perceptual import PerceptualLoss

_PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


@dataclass(frozen=True)
class Taught:
    """The images and the teacher's results for them, from which the student learns.

    Attributes:
        images: (B, C, H, W) in [-1, 1].
        recon: the teacher's reconstruction in [-1, 1], without gradient. None if the loss does not
            need it.
        z: the teacher's latents of the images, converted to the scale of the student's latents,
            (B, d, h, w).
    """

    images: Tensor
    recon: Tensor | None
    z: Tensor


class DistillationLoss(nn.Module):
    """Compute the student's loss, a scalar, and its unweighted terms for the log.

    Args:
        rec_loss: pixel error, "l1" or "l2".
        perceptual: the frozen network of LPIPS. None leaves LPIPS out.
        perceptual_scale: weight of LPIPS. The pixel error has weight 1.
        teacher_share: weight of the distance to the teacher's reconstruction, from 0 to 1. The
            distance to the image has the weight 1 - `teacher_share`.
        latent_scale: weight of the mean squared error between the student's and the teacher's
            latents.
        autocast_dtype: dtype of the backbone of LPIPS. The default is float32.
    """

    def __init__(
        self,
        *,
        rec_loss: str,
        perceptual: PerceptualLoss | None,
        perceptual_scale: float,
        teacher_share: float,
        latent_scale: float,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pixel_loss = _PIXEL_LOSSES[rec_loss]
        self.perceptual = perceptual
        self.perceptual_scale = perceptual_scale
        self.shares = {"": 1.0 - teacher_share, "_teacher": teacher_share}
        self.latent_scale = latent_scale
        self.autocast_dtype = autocast_dtype

    def forward(
        self, taught: Taught, recon: Tensor | None, z: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss with its graph, and the unweighted terms by their names in the log.

        Args:
            taught: the images, and the teacher's results for them.
            recon: the student decoder's output, or None if only the encoder learns.
            z: the student encoder's output, or None if only the decoder learns.
        """
        terms: dict[str, tuple[float, Tensor]] = {}
        if recon is not None:
            terms |= self._decoder(taught, recon.float())
        if z is not None:
            terms["loss/latent"] = self.latent_scale, F.mse_loss(z.float(), taught.z)
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        return total, {name: value.detach() for name, (_, value) in terms.items()}

    def _decoder(self, taught: Taught, recon: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of each term of the decoder's loss, by its name in the log."""
        targets = {"": taught.images, "_teacher": taught.recon}
        used = {
            name: target
            for name, target in targets.items()
            if self.shares[name] > 0 and target is not None
        }
        terms = {
            f"loss/rec{name}": (self.shares[name], self.pixel_loss(recon, target))
            for name, target in used.items()
        }
        if self.perceptual is not None and self.perceptual_scale > 0:
            distances = self._lpips(self.perceptual, recon, list(used.values()))
            for name, distance in zip(used, distances, strict=True):
                terms[f"loss/lpips{name}"] = self.perceptual_scale * self.shares[name], distance
        return terms

    def _lpips(
        self, perceptual: PerceptualLoss, recon: Tensor, targets: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the LPIPS between the reconstructions and each target, averaged over images."""
        dtype = self.autocast_dtype
        with torch.autocast(recon.device.type, dtype=dtype, enabled=dtype is not None):
            features = perceptual.features(to_rgb(recon))
            with torch.no_grad():
                others = [perceptual.features(to_rgb(target)) for target in targets]
            return [perceptual.distance(other, features).mean() for other in others]


def noisy(z: Tensor, strength: float) -> Tensor:
    """Add Gaussian noise, drawn with torch's global generator, to latents (B, d, h, w).

    Each image has its own standard deviation of the noise, drawn uniformly from 0 to `strength`
    times the standard deviation of all values of `z`.
    """
    if strength == 0:
        return z
    share = torch.rand(len(z), 1, 1, 1, device=z.device, dtype=z.dtype) * strength
    return z + share * z.std() * torch.randn_like(z)
