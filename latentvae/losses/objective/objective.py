"""Compute the terms of the model's loss and their sum. `losses.objective` has the formula.

`B` batch, `C` image channels, `H W` image size.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentvae.losses.adversarial import Adversary, adaptive_weight
from latentvae.losses.augment import diff_augment
from latentvae.losses.colors import MID_GREY, to_rgb
from latentvae.losses.logit_laplace import logit_laplace
from latentvae.losses.objective.adversarial_weight import AdversarialWeight
from latentvae.losses.objective.kl_forms import KLFactor, KLForm, PlainKL, WarmUp
from latentvae.losses.objective.kl_target import KLTarget
from latentvae.losses.objective.loss_values import Loss
from latentvae.outputs import AutoencoderOutput

ADVERSARIAL = "discriminator/adversarial"  # name of the adversarial term in the log
_PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class Likelihood(Protocol):
    """A likelihood of pixels, see `latentvae.likelihoods`."""

    def nll(self, images: Tensor, parameters: Tensor) -> Tensor: ...

    def mean(self, parameters: Tensor) -> Tensor: ...


class Objective(nn.Module):
    """Computes the model's loss, a weighted sum of named terms.

        loss = objective(images, out, update=update)
        loss.total.backward()

    A call of the objective returns the complete loss. The training loop computes the parts of the
    loss separately instead, so that one backward pass through the decoder is enough. The training
    loop calls `reconstruction` and `adversarial_value` on a detached reconstruction. Then the
    training loop calls `adversarial_part` to weight the adversarial loss, and `latent` for the
    losses of the latents.

    Args:
        rec_loss: pixel loss, "l1" or "l2".
        perceptual: LPIPS, a frozen network (images, recon) -> (B,). None leaves LPIPS out.
        perceptual_scale: weight of LPIPS. The pixel loss has weight 1.
        features: `FeatureLoss`, a frozen network (images, recon) -> (B,). None leaves the
            feature loss out.
        feature_scale: weight of the distance that `features` returns.
        logit_laplace_scale: weight of the logit-Laplace loss. 0 leaves the logit-Laplace loss out.
        kl_scale: weight of the KL. None if the latent has no KL.
        latent_weights: weights of the bottleneck's losses, by name.
        kl_form: form of the KL in the loss.
        kl_factor: factor on the KL's weight in an update: a warm-up or a `KLTarget`.
        adversarial: weight of the adversarial term.
        likelihood: likelihood whose parameters the decoder returns. The likelihood replaces the
            pixel loss. LPIPS, the feature loss and the discriminator get the likelihood's `mean` as
            the image.
        autocast_dtype: dtype in which the networks of LPIPS and of the feature loss run. The
            default is float32. The LPIPS distance and the feature loss are always float32.

    Attributes:
        weights: constant weight of each term except the adversarial term, by name. `kl_factor` also
            multiplies the KL's weight.
    """

    def __init__(
        self,
        *,
        rec_loss: str,
        perceptual: nn.Module | None,
        perceptual_scale: float,
        kl_scale: float | None,
        features: nn.Module | None = None,
        feature_scale: float = 0.0,
        logit_laplace_scale: float = 0.0,
        latent_weights: Mapping[str, float] | None = None,
        kl_form: KLForm | None = None,
        kl_factor: KLFactor | None = None,
        adversarial: AdversarialWeight | None = None,
        likelihood: Likelihood | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # terms and their constant weights
        self.pixel_loss: Callable[..., Tensor] = _PIXEL_LOSSES[rec_loss]
        self.perceptual, self.features = perceptual, features
        self.weights = {"rec": 1.0, "lpips": perceptual_scale}
        if logit_laplace_scale:
            self.weights["logit_laplace"] = logit_laplace_scale
        if features is not None:
            self.weights["feature"] = feature_scale
        self.weights |= latent_weights or {}
        if kl_scale is not None:
            self.weights["kl"] = kl_scale

        # policies
        self.kl_form: KLForm = kl_form or PlainKL()
        self.kl_factor: KLFactor = kl_factor or WarmUp()
        self.adversarial = adversarial or AdversarialWeight()
        self.likelihood = likelihood
        self.autocast_dtype = autocast_dtype

    @property
    def kl_target(self) -> KLTarget | None:
        """The controller that changes the KL's weight to reach a target, or None."""
        return self.kl_factor if isinstance(self.kl_factor, KLTarget) else None

    def forward(
        self,
        images: Tensor,
        out: AutoencoderOutput,
        *,
        update: int,
        adversary: Adversary | None = None,
        last_layer: Tensor | None = None,
        background: Tensor | float = MID_GREY,
    ) -> Loss:
        """Return the complete loss with its graph, for one call of `.backward()`.

        With an adversary, `.backward()` also adds gradients to the discriminator's weights.

        Args:
            images: (B, C, H, W) in [-1, 1].
            out: the network's output for the images.
            update: number of updates done. The KL's capacity and warm-up depend on this number.
            adversary: the discriminator. None leaves out the adversarial term.
            last_layer: weight tensor of the decoder's last layer, needed only for an adaptive
                adversarial weight.
            background: colour behind transparent pixels, for LPIPS, the feature loss and the
                discriminator (`losses.colors`).
        """
        loss = self.reconstruction(images, out.recon, out.output_logvar, background=background)

        # adversarial term, with gradients at the reconstruction for its adaptive weight
        if adversary is not None:
            value = self.adversarial_value(out.recon, adversary, background=background)
            nll_grad, value_grad = (
                torch.autograd.grad(term, out.recon, retain_graph=True)[0]
                for term in (loss.total, value)
            )
            loss += self.adversarial_part(
                value,
                factor=adversary.factor,
                recon=out.recon,
                last_layer=last_layer,
                nll_grad=nll_grad,
                adversarial_grad=value_grad,
            )

        return loss + self.latent(images, out, update=update)

    # Terms of the reconstruction

    def reconstruction(
        self,
        images: Tensor,
        recon: Tensor,
        output_logvar: Tensor,
        *,
        background: Tensor | float = MID_GREY,
    ) -> Loss:
        """Return the reconstruction part of the loss, a negative log-likelihood.

        The reconstruction part contains the pixel losses, LPIPS, the feature loss and the output's
        log-variance.
        """
        terms = self.reconstruction_terms(images, recon, background=background)
        nll = self.nll(terms, output_logvar)
        means = {f"loss/{name}": term.mean() for name, term in terms.items()}
        variance = output_logvar.detach().exp()
        weights = {f"loss/{name}": self.weights[name] / variance for name in terms}
        return Loss(
            total=nll,
            values=means | {"objective/output_logvar": output_logvar},
            weights=weights | {"objective/output_logvar": 1.0},
            log={name: mean.detach() for name, mean in means.items()} | {"loss/nll": nll.detach()},
        )

    def reconstruction_terms(
        self, images: Tensor, recon: Tensor, *, background: Tensor | float = MID_GREY
    ) -> dict[str, Tensor]:
        """Return the unweighted terms that depend on ``recon``: one value per image, (B,).

        `rec` and `logit_laplace` are means over all pixels and channels of an image. The result has
        only the terms that this objective uses.
        """
        if self.likelihood is not None:
            pixel = self.likelihood.nll(images, recon)
        else:
            pixel = self.pixel_loss(recon.float(), images.float(), reduction="none")
        terms = {"rec": pixel.flatten(1).mean(1)}
        if "logit_laplace" in self.weights:
            terms["logit_laplace"] = logit_laplace(recon, images).flatten(1).mean(1)

        # distances by frozen networks
        networks = {"lpips": self.perceptual, "feature": self.features}
        for name, network in networks.items():
            if network is None:
                continue
            with torch.autocast(
                images.device.type,
                dtype=self.autocast_dtype,
                enabled=self.autocast_dtype is not None,
            ):
                terms[name] = network(
                    to_rgb(images, background), to_rgb(self.picture(recon), background)
                )
        return terms

    def picture(self, recon: Tensor) -> Tensor:
        """Return the image (B, C, H, W) that the decoder's output describes.

        If the decoder returns parameters of a likelihood, the image is the likelihood's mean.
        """
        return recon if self.likelihood is None else self.likelihood.mean(recon)

    def nll(self, terms: dict[str, Tensor], output_logvar: Tensor) -> Tensor:
        """Return the negative log-likelihood per image element, a scalar, up to a constant."""
        error = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(dim=0)
        return error.mean() / output_logvar.exp() + output_logvar

    # Adversarial term

    def adversarial_value(
        self, recon: Tensor, adversary: Adversary, *, background: Tensor | float = MID_GREY
    ) -> Tensor:
        """Return the unweighted adversarial loss of the model, a scalar with its graph."""
        seen = diff_augment(to_rgb(self.picture(recon), background), adversary.augment)
        return adversary.loss.generator(adversary.discriminator(seen))

    def adversarial_part(
        self,
        value: Tensor,
        *,
        factor: float,
        recon: Tensor,
        last_layer: Tensor | None,
        nll_grad: Tensor,
        adversarial_grad: Tensor,
    ) -> Loss:
        """Return the adversarial term with its current weight.

        Args:
            value: the result of `adversarial_value`.
            factor: weight before it is multiplied by the adaptive weight, see
                `AdversarialWeight.factor`.
            recon: the decoder's output with its graph.
            last_layer: weight tensor of the decoder's last layer, which the adaptive weight needs.
            nll_grad, adversarial_grad: gradients of the reconstruction loss and of the adversarial
                loss with respect to ``recon``.

        Raises:
            ValueError: the weight is adaptive, but ``last_layer`` is None.
        """
        # adaptive weight
        balance = torch.ones((), device=recon.device)
        if self.adversarial.adaptive:
            if last_layer is None:
                raise ValueError("An adaptive adversarial weight needs last_layer (got None).")
            balance = adaptive_weight(
                recon,
                last_layer,
                nll_grad=nll_grad,
                adversarial_grad=adversarial_grad,
                cap=self.adversarial.cap_at(recon[0].numel()),
            )

        weight = factor * balance
        return Loss(
            total=weight * value,
            values={ADVERSARIAL: value},
            weights={ADVERSARIAL: weight},
            log={ADVERSARIAL: value.detach(), "discriminator/adaptive_weight": balance},
        )

    # Terms of the latents

    def latent(self, images: Tensor, out: AutoencoderOutput, *, update: int) -> Loss:
        """Return the losses of the latents: the bottleneck's losses and the KL.

        If the network has no bottleneck losses and no KL, the total is 0 and has no graph.
        """
        elements = images[0].numel()
        values = {f"loss/{name}": value for name, value in out.latent_losses.items()}
        weights: dict[str, Tensor | float] = {
            f"loss/{name}": self._weight(name) for name in out.latent_losses
        }
        log = {name: value.detach() for name, value in values.items()}

        if out.kl is not None:
            kl = self.kl_form(out, update=update) / elements
            values[self.kl_form.name] = kl.mean()
            weights[self.kl_form.name] = self._weight("kl") * self.kl_factor(update)
            log["loss/kl"] = (out.kl.detach() / elements).mean()

        weighted = [weights[name] * value for name, value in values.items()]
        total = torch.stack(weighted).sum() if weighted else out.output_logvar.new_zeros(())
        return Loss(total=total, values=values, weights=weights, log=log)

    def _weight(self, name: str) -> float:
        if name not in self.weights:
            listed = ", ".join(self.weights)
            raise ValueError(f"The objective has no weight for the term {name} (it has {listed}).")
        return self.weights[name]

    # Other functions of the objective

    def only(self, *names: str) -> "Objective":
        """Return a copy of the objective in which all terms except ``names`` have the weight 0.

        The copy has constant weights and the plain KL. The copy uses the same frozen networks as
        the original. The adversarial term is not changed.
        """
        other = copy.copy(self)
        other.weights = {name: w if name in names else 0.0 for name, w in self.weights.items()}
        other.kl_form, other.kl_factor = PlainKL(), WarmUp()
        return other

    def formula(self, *, rec: str, lpips: str) -> str:
        """Return the objective as text, such as "l1 + 1 LPIPS-vgg + 1e-06 KL".

        The adversarial term is left out.

        Args:
            rec, lpips: names of the pixel loss and of LPIPS in the text.
        """
        own = {"lpips": lpips, "feature": "feature loss", "kl": "KL"}
        own["logit_laplace"] = "logit-Laplace"
        named = {name: own.get(name, name.replace("_", " ")) for name in self.weights}
        shown = [name for name, weight in self.weights.items() if weight or name == "kl"]
        text = rec + "".join(
            f" + {self.weights[name]:g} {named[name]}" for name in shown if name != "rec"
        )
        if self.kl_target is not None:
            target = self.kl_target.unit.format(self.kl_target.target)
            text += f", with the KL's weight adapted to reach {target}"
        return text.replace("+ -", "- ")
