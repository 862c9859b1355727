"""The objective: named loss terms and their weights (Rombach et al. 2022, arXiv:2112.10752,
appendix G).

    nll = mean(pixel + perceptual_scale * lpips) / exp(output_logvar) + output_logvar
    loss = nll + kl_scale * kl + weighted terms of a codebook + adversarial part (see
    tasks/autoencoder/update.py)

Reductions, once and for all: pixel terms are means over image elements; the KL is its sum over
latent elements divided by the number of image elements. Everything is thus Stable Diffusion's sum
divided by C*H*W: its 1e-6 keeps its meaning, and no weight depends on the resolution or the batch
size.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentvae.losses.colors import MID_GREY, to_rgb
from latentvae.outputs import AutoencoderOutput

_PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class Likelihood(Protocol):
    """Of pixels, see `latentvae.likelihoods`."""

    def nll(self, images: Tensor, parameters: Tensor) -> Tensor: ...

    def mean(self, parameters: Tensor) -> Tensor: ...


class Objective(nn.Module):
    """Weights and terms of the model's loss, but for the critic's part.

    Args:
        rec_loss: "l1" or "l2".
        perceptual: LPIPS (images, recon) -> (B,), frozen; None leaves the term out.
        perceptual_scale: weight of LPIPS beside the pixel term.
        kl_scale: weight of the KL.
        latent_weights: of the terms of a discrete bottleneck, by name.
        likelihood: takes the pixel loss's place where the decoder gives its parameters; its `mean`
            is the picture that LPIPS and the critic see.
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
        latent_weights: Mapping[str, float] | None = None,
        likelihood: Likelihood | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pixel_loss = _PIXEL_LOSSES[rec_loss]
        self.perceptual = perceptual
        self.perceptual_scale = perceptual_scale
        self.latent_weights = {"kl": kl_scale, **(latent_weights or {})}
        self.likelihood = likelihood
        self.autocast_dtype = autocast_dtype

    def reconstruction_terms(
        self, images: Tensor, recon: Tensor, *, background: Tensor | float = MID_GREY
    ) -> dict[str, Tensor]:
        """Unweighted terms that depend on ``recon``, each (B,): `rec` per image element, over all
        channels, and, if used, `lpips`; ``background`` is what LPIPS sees behind alpha."""
        if self.likelihood is not None:
            pixel = self.likelihood.nll(images, recon)
        else:
            pixel = self.pixel_loss(recon.float(), images.float(), reduction="none")
        terms = {"rec": pixel.flatten(1).mean(1)}
        if self.perceptual is not None:
            with torch.autocast(
                images.device.type,
                dtype=self.autocast_dtype,
                enabled=self.autocast_dtype is not None,
            ):
                terms["lpips"] = self.perceptual(
                    to_rgb(images, background), to_rgb(self.picture(recon), background)
                )
        return terms

    def picture(self, recon: Tensor) -> Tensor:
        """The image (B, C, H, W) that a decoder's output means."""
        return recon if self.likelihood is None else self.likelihood.mean(recon)

    def nll(self, terms: dict[str, Tensor], output_logvar: Tensor) -> Tensor:
        """Negative log-likelihood of the reconstruction per image element, up to a constant; a
        scalar."""
        error = terms["rec"]
        if "lpips" in terms:
            error = error + self.perceptual_scale * terms["lpips"]
        return error.mean() / output_logvar.exp() + output_logvar

    def latent_terms(self, images: Tensor, out: AutoencoderOutput) -> dict[str, Tensor]:
        """Unweighted terms that depend on the latent: `kl` (B,) in nats per image element, and
        those of a discrete bottleneck, scalars."""
        terms = out.latent_losses
        return terms if out.kl is None else terms | {"kl": out.kl / images[0].numel()}

    def latent_loss(self, terms: dict[str, Tensor]) -> Tensor | None:
        """Weighted latent terms, a scalar; None where there are none."""
        weighted = [self.latent_weights[name] * term.mean() for name, term in terms.items()]
        return torch.stack(weighted).sum() if weighted else None
