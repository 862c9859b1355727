"""One update: one forward pass, one pass back through the decoder, then the critic on the same
images and reconstructions."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentvae.losses.adversarial import adaptive_weight, hinge_critic_loss, hinge_generator_loss
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
    """

    critic: nn.Module
    prepared: nn.Module
    factor: float
    adaptive: bool
    cap: float


def backward_model(
    images: Tensor,
    out: AutoencoderOutput,
    *,
    objective: Objective,
    last_layer: Tensor,
    adversary: Adversary | None,
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
        divide_by: micro-steps of this update, whose gradients are averaged.

    Returns:
        Unweighted terms and weights by log name, scalars on the device.
    """
    recon = out.recon.detach().requires_grad_()
    terms = objective.reconstruction_terms(images, recon)
    nll = objective.nll(terms, out.output_logvar)
    learned = [out.output_logvar] if out.output_logvar.requires_grad else []
    nll_grad, *logvar_grad = torch.autograd.grad(nll, [recon, *learned])
    latent_terms = objective.latent_terms(images, out)
    log = {f"loss/{name}": value.detach().mean() for name, value in (terms | latent_terms).items()}
    log["loss/nll"] = nll.detach()
    recon_grad = nll_grad
    if adversary is not None:
        adversarial, adversarial_grad = _adversarial(recon, adversary)
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
    torch.autograd.backward(
        [out.recon, objective.latent_loss(latent_terms) / divide_by, *learned],
        [recon_grad / divide_by, None, *(grad / divide_by for grad in logvar_grad)],
    )
    return log


def _adversarial(recon: Tensor, adversary: Adversary) -> tuple[Tensor, Tensor]:
    """The generator's loss and its gradient at ``recon``."""
    loss = hinge_generator_loss(adversary.critic(recon))
    (grad,) = torch.autograd.grad(loss, recon)
    return loss.detach(), grad


def backward_critic(
    images: Tensor, recon: Tensor, *, adversary: Adversary, divide_by: int = 1
) -> dict[str, Tensor]:
    """Add the hinge loss's gradient to the critic's parameters; ``recon`` is detached here."""
    logits = adversary.prepared(torch.cat([images, recon.detach()]))
    real, fake = logits.float().chunk(2)
    loss = hinge_critic_loss(real, fake)
    (loss / divide_by).backward()
    return {
        "critic/loss": loss.detach(),
        "critic/logits_real": real.detach().mean(),
        "critic/logits_fake": fake.detach().mean(),
    }


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the joint gradient norm in place; returns the norm before, which is non-finite if any
    gradient is."""
    return torch.nn.utils.clip_grad_norm_(list(parameters), max_norm)
