"""Make one update of model and discriminator as widely copied scripts do.

The losses and gradients are the same as in this project's update. The order of computation is that
of these scripts:

- huggingface/diffusers at 58eb52c,
  examples/research_projects/autoencoderkl/train_autoencoderkl.py
- CompVis/taming-transformers at 3ba01b2, taming/models/vqgan.py with
  taming/modules/losses/vqperceptual.py

This module reimplements the scripts instead of copying their code. The three reimplementations are
called references. In one update, the references do the following:

1. "diffusers as-is" starts with the model's step: a forward pass of the model, of LPIPS and of the
   discriminator. In the model's step, the discriminator's weights also get gradients, which are not
   used. The adaptive weight takes two backward passes down to the decoder's last layer, one through
   LPIPS and one through the discriminator. Then the backward pass of the summed loss goes through
   LPIPS and the discriminator again, and through the model. The discriminator's step has a second
   forward pass of the model, with an autograd graph. Then the discriminator sees images and
   reconstructions. The reconstructions are not detached, so the backward pass of the
   discriminator's loss goes through the whole model. The discriminator's step deletes the resulting
   gradients of the model without using them.
2. "diffusers mended" corrects two faults of "diffusers as-is". In the model's step, the
   discriminator is frozen. In the discriminator's step, the model has no autograd graph.
3. "taming" also freezes the discriminator in the model's step, and the model in the
   discriminator's step, as Lightning does for two optimisers. Unlike "diffusers mended", "taming"
   computes LPIPS also in the discriminator's step.

In diffusers' script, LPIPS has no gradient. In this module, LPIPS has a gradient in all references,
so that all references compute the same gradient. All references have the following in common:

- LPIPS, computed by the forward pass of the package `lpips`
- the same discriminator (with GroupNorm instead of BatchNorm), and no dropout
- torch's default AdamW, diffusers' default `EMAModel`, clipping to norm 1, and float32 (bfloat16
  autocast only with the argument `autocast`)

Each reference copies as many logged values to the CPU as its script. Losses are sums over pixels in
diffusers' script, and means over pixels in taming's script. `ReferenceStep.scale` is the ratio of a
script's losses to this project's losses.

`B` batch, `C` channels, `H W` space.
"""

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from lpips import LPIPS
from torch import Tensor, nn

from latentvae.compute.stock_layers import restore_stock_layers
from latentvae.errors import UserError

LEARNING_RATE, EMA_DECAY, MAX_NORM, CAP = 4.5e-6, 0.9999, 1.0, 1e4


@dataclass(frozen=True)
class Weights:
    """Weights of the loss terms, for losses that are means over image elements."""

    lpips: float
    kl: float
    adversarial: float


@dataclass(frozen=True)
class Script:
    """The properties of the training step in which the public scripts differ.

    Attributes:
        summed: whether the script's losses are sums over pixels instead of means.
        freezes_discriminator: whether the discriminator has no gradients in the model's step.
        detaches: whether the model has no autograd graph in the discriminator's step.
        lpips_in_discriminator_step: whether LPIPS is also computed in the discriminator's step.
    """

    summed: bool
    freezes_discriminator: bool
    detaches: bool
    lpips_in_discriminator_step: bool


SCRIPTS = {
    "diffusers as-is": Script(True, False, False, False),
    "diffusers mended": Script(True, True, True, False),
    "taming": Script(False, True, True, True),
}


class ReferenceStep:
    """Makes updates of a model and its discriminator, with the computations of a public script.

    Args:
        script: an entry of `SCRIPTS`.
        net, discriminator: the networks. The reference copies the networks, so that all references
            start from the same weights.
        lpips: the frozen LPIPS network.
        weights: weights of the loss terms.
        autocast: run the steps of model and discriminator in bfloat16 autocast. The public scripts
            do not use bfloat16 correctly.
        stock: use the layers of torch and diffusers, as the scripts do. False keeps the layers of
            this project's networks, of which some are faster.
    """

    def __init__(
        self,
        script: Script,
        net: AutoencoderKL,
        discriminator: nn.Module,
        lpips: LPIPS,
        *,
        weights: Weights,
        autocast: bool = False,
        stock: bool = True,
    ) -> None:
        # networks
        self.script, self.weights = script, weights
        self.net: Any = copy.deepcopy(net)
        self.lpips = copy.deepcopy(lpips)
        if stock:  # this project's runs replace some layers by faster layers
            restore_stock_layers(self.net)
            restore_stock_layers(self.lpips.to(memory_format=torch.contiguous_format))
        self.discriminator = copy.deepcopy(discriminator)

        # optimisers and average
        self.autocast = autocast
        self.optimizer, self.discriminator_optimizer = (
            torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
            for module in (self.net, self.discriminator)
        )
        self.ema = EMAModel(list(self.net.parameters()), decay=EMA_DECAY)

    def update(self, images: Tensor) -> None:
        """Make one update of the model, then one of the discriminator."""
        # model
        self.backward_model(images)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.ema.step(self.net.parameters())

        # discriminator. In each step, "diffusers as-is" also leaves gradients in the other network.
        recon = self.reconstruct_for_discriminator(images)
        self.discriminator_optimizer.zero_grad(set_to_none=False)
        self.backward_discriminator(images, recon)
        torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), MAX_NORM)
        self.discriminator_optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def scale(self, images: Tensor) -> float:
        """Return the factor by which the script's loss is larger than this project's loss."""
        return float(images[0].numel()) if self.script.summed else 1.0

    def backward_model(self, images: Tensor) -> dict[str, float]:
        """Compute the model's losses, and add the loss gradient to the `grad` of each weight.

        The added gradient is `scale` times the gradient of this project's update.

        Returns:
            The losses and the adaptive weight that the script logs, at the scale of this project's
            losses.
        """
        scale = self.scale(images)
        with (
            self._precision(images),
            self._frozen(self.discriminator, self.script.freezes_discriminator),
        ):
            # losses
            posterior = self.net.encode(images).latent_dist
            recon = self.net.decode(posterior.sample()).sample
            rec, perceptual = self._distances(images, recon)
            nll = (rec + self.weights.lpips * perceptual).mean() * scale
            kl = posterior.kl().mean() / images[0].numel()
            adversarial = -self.discriminator(recon).float().mean()

            # adaptive weight and sum
            last = self.net.decoder.conv_out.weight
            norms = [
                torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
                for loss in (nll, adversarial)
            ]
            adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(max=CAP * scale).detach()
            loss = nll + self.weights.kl * scale * kl
            loss = loss + self.weights.adversarial * adaptive * adversarial

        loss.backward()
        return {  # Reading each value makes the host wait for the device, as in the script.
            "nll": nll.item() / scale,
            "rec": rec.mean().item(),
            "lpips": perceptual.mean().item(),
            "kl": kl.item(),
            "adversarial": adversarial.item(),
            "adaptive_weight": adaptive.item() / scale,
        }

    def reconstruct_for_discriminator(self, images: Tensor) -> Tensor:
        """Return reconstructions by a second forward pass of the model."""
        with self._precision(images), torch.set_grad_enabled(not self.script.detaches):
            recon = self.net.decode(self.net.encode(images).latent_dist.sample()).sample
            if self.script.lpips_in_discriminator_step:
                rec, perceptual = self._distances(images, recon)
                (rec + self.weights.lpips * perceptual).mean()
        return recon

    def backward_discriminator(self, images: Tensor, recon: Tensor) -> dict[str, float]:
        """Add the loss gradient to the discriminator's `grad`. Return the loss and mean logits."""
        with self._precision(images):
            real, fake = self.discriminator(images).float(), self.discriminator(recon).float()
            loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        loss.backward()
        return {
            "discriminator": loss.item(),
            "real": real.mean().item(),
            "fake": fake.mean().item(),
        }

    def _distances(self, images: Tensor, recon: Tensor) -> tuple[Tensor, Tensor]:
        """Return the absolute errors (B, C, H, W) and LPIPS (B, 1, 1, 1) of reconstructions."""
        rec = F.l1_loss(recon.float(), images.float(), reduction="none")
        return rec, self.lpips(images.contiguous(), recon.contiguous())

    @contextmanager
    def _precision(self, images: Tensor) -> Iterator[None]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            yield

    @contextmanager
    def _frozen(self, module: nn.Module, frozen: bool) -> Iterator[None]:
        module.requires_grad_(not frozen)
        yield
        module.requires_grad_(True)


class TamingStep(ReferenceStep):
    """Makes updates with the loss module of a clone of taming-transformers.

    The network, LPIPS and the discriminator are the same as in the other references.

    Args:
        folder: a git clone of CompVis/taming-transformers.
        net, discriminator, lpips, weights, stock: see `ReferenceStep`.
    """

    def __init__(
        self,
        folder: Path,
        net: AutoencoderKL,
        discriminator: nn.Module,
        lpips: LPIPS,
        *,
        weights: Weights,
        stock: bool = True,
    ) -> None:
        own = Script(
            summed=False,
            freezes_discriminator=True,
            detaches=True,
            lpips_in_discriminator_step=False,  # taming's loss does this itself
        )
        super().__init__(own, net, discriminator, lpips, weights=weights, stock=stock)

        # Use the given LPIPS and discriminator. taming would build its own, and download LPIPS.
        module = _imported(folder, "taming.modules.losses.vqperceptual")
        module.LPIPS = lambda: self.lpips
        module.NLayerDiscriminator = lambda **_: self.discriminator
        module.weights_init = lambda _: None
        self.loss = module.VQLPIPSWithDiscriminator(
            disc_start=0,
            codebook_weight=weights.kl,
            perceptual_weight=weights.lpips,
            disc_weight=weights.adversarial,
        )

    def backward_model(self, images: Tensor) -> dict[str, float]:
        with self._frozen(self.discriminator, True):
            posterior = self.net.encode(images).latent_dist
            recon = self.net.decode(posterior.sample()).sample
            kl = posterior.kl() / images[0].numel()
            loss, log = self._called(images, recon, kl, 0)
        loss.backward()
        values = {name.removeprefix("train/"): value.mean().item() for name, value in log.items()}
        return {
            "nll": values["nll_loss"],
            "rec": values["rec_loss"] - self.weights.lpips * values["p_loss"],
            "lpips": values["p_loss"],
            "kl": values["quant_loss"],
            "adversarial": values["g_loss"],
            "adaptive_weight": values["d_weight"] / self.weights.adversarial,
        }

    def backward_discriminator(self, images: Tensor, recon: Tensor) -> dict[str, float]:
        loss, log = self._called(images, recon, torch.zeros(()), 1)
        loss.backward()
        return {"discriminator": loss.item()} | {name: value.item() for name, value in log.items()}

    def _called(self, images: Tensor, recon: Tensor, kl: Tensor, side: int) -> Any:
        last = self.net.decoder.conv_out.weight
        return self.loss(kl, images, recon, side, 1, last_layer=last, split="train")


def _imported(folder: Path, name: str) -> Any:
    """Import a module of a git clone that is not installed."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            "peer_script must be a clone of CompVis/taming-transformers, but nothing can be "
            f"imported from '{folder}': {error}"
        ) from error
    finally:
        sys.path.remove(str(folder))


def gradient(module: nn.Module, *, scale: float = 1.0) -> Tensor:
    """Return all gradients of a module as one float64 vector, divided by `scale`."""
    grads = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(grads) / scale


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of `found - expected`, divided by the norm of `expected`."""
    return ((found - expected).norm() / expected.norm()).item()
