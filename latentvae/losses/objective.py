"""The objective: named loss terms and their weights (Rombach et al. 2022, arXiv:2112.10752,
appendix G).

    nll = mean(pixel + perceptual_scale * lpips) / exp(output_logvar) + output_logvar
    loss = nll + kl_scale * kl + adversarial part (see training/update.py)

Reductions, once and for all: pixel terms are means over image elements; the KL is its sum over
latent elements divided by the number of image elements. Everything is thus Stable Diffusion's sum
divided by C*H*W: its 1e-6 keeps its meaning, and no weight depends on the resolution or the batch
size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentvae.losses.colors import MID_GREY, to_rgb
from latentvae.outputs import AutoencoderOutput

_PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class Objective(nn.Module):
    """Weights and terms of the model's loss, but for the critic's part.

    Args:
        rec_loss: "l1" or "l2".
        perceptual: LPIPS (images, recon) -> (B,), frozen; None leaves the term out.
        perceptual_scale: weight of LPIPS beside the pixel term.
        kl_scale: weight of the KL.
        autocast_dtype: run LPIPS' trunk in this dtype (its distances stay float32); None for
            float32.
    """

    def __init__(
        self,
        *,
        rec_loss: str,
        perceptual: nn.Module | None,
        perceptual_scale: float,
        kl_scale: float,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pixel_loss = _PIXEL_LOSSES[rec_loss]
        self.perceptual = perceptual
        self.perceptual_scale = perceptual_scale
        self.kl_scale = kl_scale
        self.autocast_dtype = autocast_dtype

    def reconstruction_terms(
        self, images: Tensor, recon: Tensor, *, background: Tensor | float = MID_GREY
    ) -> dict[str, Tensor]:
        """Unweighted terms that depend on ``recon``, each (B,): `rec` per image element, over all
        channels, and, if used, `lpips`; ``background`` is what LPIPS sees behind alpha."""
        pixel = self.pixel_loss(recon.float(), images.float(), reduction="none").flatten(1).mean(1)
        terms = {"rec": pixel}
        if self.perceptual is not None:
            with torch.autocast(
                images.device.type,
                dtype=self.autocast_dtype,
                enabled=self.autocast_dtype is not None,
            ):
                terms["lpips"] = self.perceptual(
                    to_rgb(images, background), to_rgb(recon, background)
                )
        return terms

    def nll(self, terms: dict[str, Tensor], output_logvar: Tensor) -> Tensor:
        """Negative log-likelihood of the reconstruction per image element, up to a constant; a
        scalar."""
        error = terms["rec"]
        if "lpips" in terms:
            error = error + self.perceptual_scale * terms["lpips"]
        return error.mean() / output_logvar.exp() + output_logvar

    def latent_terms(self, images: Tensor, out: AutoencoderOutput) -> dict[str, Tensor]:
        """Unweighted terms that depend on the latent, each (B,): `kl` in nats per image element."""
        return {"kl": out.kl / images[0].numel()}

    def latent_loss(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted latent terms; a scalar."""
        return self.kl_scale * terms["kl"].mean()
