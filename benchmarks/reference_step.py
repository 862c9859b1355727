"""One generator and discriminator update as the scripts that people copy write it: the same
mathematics as this project's update, in their order of work.

Pinned to huggingface/diffusers at 58eb52c, examples/research_projects/autoencoderkl/
train_autoencoderkl.py, and CompVis/taming-transformers at 3ba01b2, taming/models/vqgan.py with
taming/modules/losses/vqperceptual.py. Nothing is copied; what each does, per batch of each kind:

    diffusers, as-is    model: forward; LPIPS; discriminator, which collects gradients too; the
    adaptive
                        weight from two backward passes down to the last layer, through LPIPS and
                        through the discriminator; one backward of the sum, through both again
                        discriminator: forward of the model with its graph; discriminator on images
                        and on reconstructions that are not detached, so its loss goes back through
                        the whole model, where it is thrown away
    diffusers, mended   the same, but the discriminator is frozen in the model's step, and in its
    own the
                        model runs without a graph
    taming              as mended, by two optimisers of Lightning, which freezes the other side's
                        parameters; LPIPS is evaluated in the discriminator's step too

Of the first, LPIPS is mended everywhere: there it has no gradient, so it would be other
mathematics. All have the true LPIPS by the `lpips` package's own forward, the same discriminator
(GroupNorm for BatchNorm), no dropout, AdamW as torch makes it by default, diffusers' `EMAModel` as
it makes it by default, clipping at 1, float32, and as many values read for the log as the script
reads. diffusers' losses are sums over pixels, taming's means: `scale` is the factor between them.

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
    """Of the loss, as this project counts it: means over image elements."""

    lpips: float
    kl: float
    adversarial: float


@dataclass(frozen=True)
class Script:
    """How a script goes about it, see above."""

    summed: bool  # over pixels, rather than their mean
    freezes_discriminator: bool
    detaches: bool
    lpips_in_discriminator_step: bool


SCRIPTS = {
    "diffusers as-is": Script(True, False, False, False),
    "diffusers mended": Script(True, True, True, False),
    "taming": Script(False, True, True, True),
}


class ReferenceStep:
    """Model, discriminator, optimisers and average of a script.

    Args:
        net, discriminator: copied, so that all references start from the same weights.
        lpips: frozen.
        autocast: run both steps in bfloat16 autocast, as none of the scripts rightly does.
        stock: with the stock layers, as the scripts compute; else with those that `net` has.
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
        self.script, self.weights = script, weights
        self.net: Any = copy.deepcopy(net)
        self.lpips = copy.deepcopy(lpips)
        if stock:  # in a run some layers are those that compute less
            restore_stock_layers(self.net)
            restore_stock_layers(self.lpips.to(memory_format=torch.contiguous_format))
        self.discriminator = copy.deepcopy(discriminator)
        self.autocast = autocast
        self.optimizer, self.discriminator_optimizer = (
            torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
            for module in (self.net, self.discriminator)
        )
        self.ema = EMAModel(list(self.net.parameters()), decay=EMA_DECAY)

    def update(self, images: Tensor) -> None:
        """One update of the model, then one of the discriminator."""
        self.backward_model(images)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.ema.step(self.net.parameters())
        recon = self.reconstruct_for_discriminator(images)
        self.discriminator_optimizer.zero_grad(
            set_to_none=False
        )  # as-is, the model's step leaves some
        self.backward_discriminator(images, recon)
        torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), MAX_NORM)
        self.discriminator_optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # and the discriminator's step in the model

    def scale(self, images: Tensor) -> float:
        """How many times this project's loss the script's is."""
        return float(images[0].numel()) if self.script.summed else 1.0

    def backward_model(self, images: Tensor) -> dict[str, float]:
        """Add the model's gradient, `scale` times as long; returns the losses as they are logged,
        in this project's terms."""
        scale = self.scale(images)
        with (
            self._precision(images),
            self._frozen(self.discriminator, self.script.freezes_discriminator),
        ):
            posterior = self.net.encode(images).latent_dist
            recon = self.net.decode(posterior.sample()).sample
            rec, perceptual = self._distances(images, recon)
            nll = (rec + self.weights.lpips * perceptual).mean() * scale
            kl = posterior.kl().mean() / images[0].numel()
            adversarial = -self.discriminator(recon).float().mean()
            last = self.net.decoder.conv_out.weight
            norms = [
                torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
                for loss in (nll, adversarial)
            ]
            adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(max=CAP * scale).detach()
            loss = nll + self.weights.kl * scale * kl
            loss = loss + self.weights.adversarial * adaptive * adversarial
        loss.backward()
        return {  # each read costs a host sync, as in the script
            "nll": nll.item() / scale,
            "rec": rec.mean().item(),
            "lpips": perceptual.mean().item(),
            "kl": kl.item(),
            "adversarial": adversarial.item(),
            "adaptive_weight": adaptive.item() / scale,
        }

    def reconstruct_for_discriminator(self, images: Tensor) -> Tensor:
        """The second forward pass of the model."""
        with self._precision(images), torch.set_grad_enabled(not self.script.detaches):
            recon = self.net.decode(self.net.encode(images).latent_dist.sample()).sample
            if self.script.lpips_in_discriminator_step:
                rec, perceptual = self._distances(images, recon)
                (rec + self.weights.lpips * perceptual).mean()
        return recon

    def backward_discriminator(self, images: Tensor, recon: Tensor) -> dict[str, float]:
        """Add the discriminator's gradient; returns its loss."""
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
        """Absolute error (B, C, H, W), LPIPS (B, 1, 1, 1)."""
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
    """taming's own loss module, with the network, LPIPS and discriminator that all have.

    Args:
        folder: of a clone of CompVis/taming-transformers.
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
            lpips_in_discriminator_step=False,
        )  # for its loss does that
        super().__init__(own, net, discriminator, lpips, weights=weights, stock=stock)
        module = _imported(folder, "taming.modules.losses.vqperceptual")
        # What it would download, and a discriminator that is to start from the same weights.
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
    """A module of a clone that is not installed."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"'{folder}' is no clone of CompVis/taming-transformers that can be imported: {error}"
        ) from error
    finally:
        sys.path.remove(str(folder))


def gradient(module: nn.Module, *, scale: float = 1.0) -> Tensor:
    """All gradients as one vector, float64, divided by `scale`."""
    grads = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(grads) / scale


def relative(found: Tensor, expected: Tensor) -> float:
    """Length of the difference by that of the expected."""
    return ((found - expected).norm() / expected.norm()).item()
