"""Hinge GAN losses (Lim & Ye 2017, arXiv:1705.02894) and VQGAN's adaptive weight (arXiv:2012.09841,
eq. 7)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.distributed import all_reduce_mean


def hinge_critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """0.5 * (E[max(0, 1 - D(x))] + E[max(0, 1 + D(recon))]); 1 when the critic says 0
    everywhere."""
    return 0.5 * (
        F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean()
    )


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E[D(recon)]."""
    return -fake_logits.float().mean()


def adaptive_weight(
    recon: Tensor, last_layer: Tensor, *, nll_grad: Tensor, adversarial_grad: Tensor, cap: float
) -> Tensor:
    """|d nll / d W| / (|d adversarial / d W| + 1e-4), capped, for the weight W of the decoder's
    last layer.

    The gradients with respect to ``recon`` are known already, so this costs two backward passes
    through one convolution and none through the decoder. Both are averaged over ranks before the
    norms are taken.

    Args:
        recon: decoder output with its graph, (B, C, H, W).
        last_layer: W, the weight of the convolution that made ``recon``.
        nll_grad: d nll / d recon, same shape as ``recon``.
        adversarial_grad: d adversarial / d recon.
        cap: largest weight returned.
    """
    norms = []
    for grad in (nll_grad, adversarial_grad):
        (at_weight,) = torch.autograd.grad(recon, last_layer, grad_outputs=grad, retain_graph=True)
        norms.append(all_reduce_mean(at_weight).float().norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=cap)
