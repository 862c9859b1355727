"""One update: one forward pass, one pass back through the decoder, then the critic on the same
images and reconstructions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentvae.losses.adversarial import (
    GAN_LOSSES,
    GANLoss,
    LeCam,
    adaptive_weight,
    r1_penalty,
)
from latentvae.losses.augment import diff_augment
from latentvae.losses.colors import MID_GREY, to_rgb
from latentvae.losses.objective import Objective
from latentvae.outputs import AutoencoderOutput


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The critic's part in an update.

    Attributes:
        critic: the bare network. The model's part only needs the gradient at the reconstruction,
            which no rank shares.
        prepared: the same network as DDP and autocast wrap it, for its own update.
        factor: weight of the adversarial term now.
        adaptive: balance it by the gradients at the last layer.
        cap: largest adaptive weight.
        loss: an entry of `GAN_LOSSES`.
        augment: policy of `diff_augment`, for all that the critic sees.
        r1_weight: weight of the R1 penalty in this update; 0 leaves it out.
        lecam: LeCam's averages; None leaves it out. The loop updates them, once per update.
        lecam_weight: weight of the LeCam penalty.
    """

    critic: nn.Module
    prepared: nn.Module
    factor: float
    adaptive: bool
    cap: float
    loss: GANLoss = GAN_LOSSES["hinge"]
    augment: Sequence[str] = ()
    r1_weight: float = 0.0
    lecam: LeCam | None = None
    lecam_weight: float = 0.0


def backward_model(
    images: Tensor,
    out: AutoencoderOutput,
    *,
    objective: Objective,
    last_layer: Tensor,
    adversary: Adversary | None,
    kl: Tensor | None = None,
    background: Tensor | float = MID_GREY,
    divide_by: int = 1,
) -> dict[str, Tensor]:
    """Add the gradient of the whole objective to the model's parameters, in one pass through the
    decoder.

    The losses are functions of a detached reconstruction; their gradients there are joined and sent
    back once. None reaches the critic's parameters.

    Args:
        images: (B, C, H, W) in [-1, 1].
        out: the wrapper's output for them, with its graph.
        last_layer: the decoder's last weight, for the adaptive weight.
        kl: scalar, nats per image with its graph, that takes the place of the mean KL in the loss
            (see `losses.posterior`); the log keeps the plain one.
        background: what LPIPS and the critic, which both see RGB, see behind alpha
            (`losses.colors`).
        divide_by: micro-steps of this update, whose gradients are averaged.

    Returns:
        Unweighted terms and weights by log name, scalars on the device.
    """
    recon = out.recon.detach().requires_grad_()
    terms = objective.reconstruction_terms(images, recon, background=background)
    nll = objective.nll(terms, out.output_logvar)
    learned = [out.output_logvar] if out.output_logvar.requires_grad else []
    nll_grad, *logvar_grad = torch.autograd.grad(nll, [recon, *learned])
    latent_terms = objective.latent_terms(images, out)
    log = {f"loss/{name}": value.detach().mean() for name, value in (terms | latent_terms).items()}
    log["loss/nll"] = nll.detach()
    if kl is not None:
        latent_terms["kl"] = kl / images[0].numel()
    recon_grad = nll_grad
    if adversary is not None:
        adversarial, adversarial_grad = _adversarial(
            recon, adversary, objective=objective, background=background
        )
        weight = torch.ones((), device=recon.device)
        if adversary.adaptive:
            weight = adaptive_weight(
                out.recon,
                last_layer,
                nll_grad=nll_grad,
                adversarial_grad=adversarial_grad,
                cap=adversary.cap,
            )
        recon_grad = nll_grad + adversary.factor * weight * adversarial_grad
        log |= {"critic/adversarial": adversarial, "critic/adaptive_weight": weight}
    latent_loss = objective.latent_loss(latent_terms)
    latent = []
    if latent_loss is not None and latent_loss.requires_grad:  # the encoder is not frozen
        latent = [latent_loss / divide_by]
    torch.autograd.backward(
        [out.recon, *latent, *learned],
        [recon_grad / divide_by, *(None for _ in latent), *(g / divide_by for g in logvar_grad)],
    )
    return log


def _adversarial(
    recon: Tensor, adversary: Adversary, *, objective: Objective, background: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The generator's loss and its gradient at ``recon``."""
    seen = diff_augment(to_rgb(objective.picture(recon), background), adversary.augment)
    loss = adversary.loss.generator(adversary.critic(seen))
    (grad,) = torch.autograd.grad(loss, recon)
    return loss.detach(), grad


def backward_critic(
    images: Tensor,
    recon: Tensor,
    *,
    adversary: Adversary,
    background: Tensor | float = MID_GREY,
    divide_by: int = 1,
) -> dict[str, Tensor]:
    """Add the gradient of the critic's loss and penalties to its parameters, in one backward pass;
    ``recon`` is detached here, and ``background`` lies behind alpha in both.

    Returns:
        Unweighted terms and mean logits by log name, scalars on the device.
    """
    both = [to_rgb(images, background), to_rgb(recon.detach(), background)]
    seen = diff_augment(torch.cat(both), adversary.augment)
    real, fake = adversary.prepared(seen).float().chunk(2)
    loss = adversary.loss.critic(real, fake)
    log = {
        "critic/loss": loss.detach(),
        "critic/logits_real": real.detach().mean(),
        "critic/logits_fake": fake.detach().mean(),
    }
    if adversary.lecam is not None:
        lecam = adversary.lecam.penalty(real, fake)
        log["critic/lecam"] = lecam.detach()
        loss = loss + adversary.lecam_weight * lecam
    if adversary.r1_weight > 0:
        r1 = r1_penalty(adversary.critic, seen[: len(images)])
        log["critic/r1"] = r1.detach()
        loss = loss + adversary.r1_weight * r1
    (loss / divide_by).backward()
    return log


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the joint gradient norm in place; returns the norm before, which is non-finite if any
    gradient is."""
    parameters = list(parameters)
    # Without any gradient, as of a model that stands still, torch gives a zero on the CPU.
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.to(parameters[0].device)
