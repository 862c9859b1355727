"""Make the backward passes of one batch: first of the model, then of the discriminator.

Both backward passes use the images and reconstructions of one forward pass.
"""

import torch
from torch import Tensor

from latentvae.losses.adversarial import Adversary, r1_penalty
from latentvae.losses.augment import diff_augment
from latentvae.losses.colors import MID_GREY, to_rgb
from latentvae.losses.objective.objective import ADVERSARIAL, Objective
from latentvae.outputs import AutoencoderOutput


def backward_model(
    images: Tensor,
    out: AutoencoderOutput,
    *,
    objective: Objective,
    update: int,
    last_layer: Tensor,
    adversary: Adversary | None,
    background: Tensor | float = MID_GREY,
    divide_by: int = 1,
) -> dict[str, Tensor]:
    """Add the gradient of the complete loss to the gradients of the model's parameters.

    The losses of the reconstruction are computed on a detached copy of it. Their gradients with
    respect to this copy are summed, and the sum is sent back through the decoder once. No gradient
    reaches the discriminator's parameters.

    Args:
        images: (B, C, H, W) in [-1, 1].
        out: output of the training wrapper for `images`, with its autograd graph.
        objective: terms and weights of the loss.
        update: number of updates done, on which the objective's schedules depend.
        last_layer: weight of the decoder's last layer, for the adaptive adversarial weight.
        adversary: the discriminator and its options. None without a discriminator, before it
            starts, and after it is switched off.
        background: colour behind transparent pixels. LPIPS and the discriminator see RGB images on
            this background (`losses.colors`).
        divide_by: number of batches (micro-steps) whose gradients are averaged for this update.

    Returns:
        Loss terms before weighting, and their weights: a dict from log names to scalars on the
        device.
    """
    # gradients at the reconstruction
    recon = out.recon.detach().requires_grad_()
    learned = [out.output_logvar] if out.output_logvar.requires_grad else []
    loss = objective.reconstruction(images, recon, out.output_logvar, background=background)
    nll_grad, *logvar_grad = torch.autograd.grad(loss.total, [recon, *learned])
    recon_grad, log = nll_grad, loss.log

    # the adversarial term
    if adversary is not None:
        value, adversarial_grad = _adversarial(
            recon, adversary, objective=objective, background=background
        )
        part = objective.adversarial_part(
            value,
            factor=adversary.factor,
            recon=out.recon,
            last_layer=last_layer,
            nll_grad=nll_grad,
            adversarial_grad=adversarial_grad,
        )
        recon_grad = nll_grad + part.weights[ADVERSARIAL] * adversarial_grad
        log |= part.log

    # one backward pass through the decoder, and through the terms of the latents
    latent = objective.latent(images, out, update=update)
    # With a frozen encoder the latents' terms have no gradient.
    of_latents = [latent.total / divide_by] if latent.total.requires_grad else []
    grads = [recon_grad / divide_by, *(None for _ in of_latents)]
    grads += [grad / divide_by for grad in logvar_grad]
    torch.autograd.backward([out.recon, *of_latents, *learned], grads)
    return log | latent.log


def _adversarial(
    recon: Tensor, adversary: Adversary, *, objective: Objective, background: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return the adversarial loss of the autoencoder, and its gradient with respect to `recon`."""
    loss = objective.adversarial_value(recon, adversary, background=background)
    (grad,) = torch.autograd.grad(loss, recon)
    return loss.detach(), grad


def backward_discriminator(
    images: Tensor,
    recon: Tensor,
    *,
    adversary: Adversary,
    background: Tensor | float = MID_GREY,
    divide_by: int = 1,
) -> dict[str, Tensor]:
    """Add the gradient of the discriminator's loss and penalties to its parameters' gradients.

    Args:
        images: (B, C, H, W) in [-1, 1].
        recon: reconstructions of `images`. This function detaches them.
        adversary: the discriminator and its options.
        background: colour behind transparent pixels in images and reconstructions.
        divide_by: number of batches (micro-steps) whose gradients are averaged for this update.

    Returns:
        Loss terms before weighting, and mean logits: a dict from log names to scalars on the
        device.
    """
    # loss
    both = [to_rgb(images, background), to_rgb(recon.detach(), background)]
    seen = diff_augment(torch.cat(both), adversary.augment)
    real, fake = adversary.prepared(seen).float().chunk(2)
    loss = adversary.loss.discriminator(real, fake)
    log = {
        "discriminator/loss": loss.detach(),
        "discriminator/logits_real": real.detach().mean(),
        "discriminator/logits_fake": fake.detach().mean(),
    }

    # penalties
    if adversary.lecam is not None:
        lecam = adversary.lecam.penalty(real, fake)
        log["discriminator/lecam"] = lecam.detach()
        loss = loss + adversary.lecam_weight * lecam
    if adversary.r1_weight > 0:
        r1 = r1_penalty(adversary.discriminator, seen[: len(images)])
        log["discriminator/r1"] = r1.detach()
        loss = loss + adversary.r1_weight * r1
    (loss / divide_by).backward()
    return log
