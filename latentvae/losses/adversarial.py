"""GAN losses, penalties on the discriminator, and VQGAN's adaptive weight.

`B` batch, `C` image channels, `H W` image size, `h w` size of the map of logits (1 x 1 is one logit
per image). `D(x)` are the logits of the discriminator. A positive logit means a real image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentvae.distributed import all_reduce_mean


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the hinge loss 0.5 * (E[max(0, 1 - D(x))] + E[max(0, 1 + D(recon))]), a scalar.

    D(x) are the logits of real images x, and D(recon) those of reconstructions. The loss is 1 if
    all logits are 0. As in VQGAN, the loss is half the hinge loss of Lim & Ye 2017
    (arXiv:1705.02894).
    """
    return 0.5 * (
        F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean()
    )


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the model's hinge loss -E[D(recon)], a scalar, from the logits of reconstructions."""
    return -fake_logits.float().mean()


def non_saturating_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return -E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(recon)))], a scalar.

    D(x) are the logits of real images x, and D(recon) those of reconstructions. The loss is the
    negative of equation 1 in the GAN paper (Goodfellow et al. 2014, arXiv:1406.2661). If all
    logits are 0, the loss is 2 log 2.
    """
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return -E[log sigmoid(D(recon))], a scalar (arXiv:1406.2661, section 3).

    D(recon) are the logits of reconstructions. The gradient does not vanish, even if the
    discriminator is sure that an image is a reconstruction.
    """
    return F.softplus(-fake_logits.float()).mean()


@dataclass(frozen=True)
class GANLoss:
    """A GAN loss, with one function for the discriminator and one function for the model.

    Both functions take logits of any shape and return a float32 scalar.

    Attributes:
        discriminator: called with the logits of real images and of reconstructions.
        generator: called with the logits of reconstructions.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


GAN_LOSSES = {
    "hinge": GANLoss(hinge_discriminator_loss, hinge_generator_loss),
    "non_saturating": GANLoss(non_saturating_discriminator_loss, non_saturating_generator_loss),
}


def r1_penalty(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return 0.5 * E[|d D(x) / d x|^2] on real images (Mescheder et al. 2018, arXiv:1801.04406).

    The formula is equation 9 of arXiv:1801.04406. D(x) is the mean of an image's logits, just as
    the GAN losses are means over logits. With more pixels, the squared gradient of this mean is
    smaller, so the penalty's weight should be larger. StyleGAN2-ADA (arXiv:2006.06676) uses the
    weight 0.0002 * H * W, divided by the number of images per update.

    Args:
        discriminator: the network without DDP's wrapper. A forward pass through the wrapper would
            prepare a second reduction of gradients. Add the penalty to the loss that was computed
            through the wrapper, and call `backward` once. DDP then reduces the sum of the gradients
            of the loss and of the penalty.
        images: real images as the discriminator gets them, (B, C, H, W).

    Returns:
        A scalar with a graph to the discriminator's parameters.
    """
    images = images.detach().requires_grad_()
    logits = discriminator(images).reshape(len(images), -1).mean(1)  # (B,)
    (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * grad.square().flatten(1).sum(1).mean()


def lazy_weight(update: int, *, weight: float, interval: int) -> float:
    """Return the weight, in update ``update``, of a penalty that only some updates compute.

    Updates are counted from 0. The weight is ``interval`` times ``weight`` in every ``interval``-th
    update, and 0 in the other updates (arXiv:1912.04958, section 3.1).
    """
    return weight * interval if update % interval == 0 else 0.0


class LeCam:
    """Computes the LeCam penalty of a discriminator (Tseng et al. 2021, arXiv:2104.03310).

    LeCam pulls the logits of real images down to the average logit of reconstructions. It pulls the
    logits of reconstructions up to the average logit of real images. This object keeps moving
    averages of the logits. Call the method `update` once per training update, and save `state_dict`
    in checkpoints. The averages start at 0, because an untrained discriminator has logits near 0.

    Args:
        decay: decay of the averages per update.
        device: device of the logits.
    """

    def __init__(self, *, decay: float = 0.99, device: torch.device | str = "cpu") -> None:
        self.decay = decay
        self.anchors = torch.zeros(2, device=device)  # average logits: real, fake

    def penalty(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return E[(D(x) - average fake)+^2] + E[(average real - D(recon))+^2], a scalar.

        D(x) are the logits of real images, D(recon) those of reconstructions ("fake"), and ()+ is
        the positive part, max(0, ...). The formula is equation 4 of arXiv:2104.03310, with the
        positive part of the authors' code (google/lecam-gan, third_party/lecam_loss.py). Without
        the positive part, the penalty would also pull up logits of real images that are below the
        average logit of reconstructions. Pulling up these logits is the task of the GAN loss.
        """
        real_anchor, fake_anchor = self.anchors.unbind()
        above = F.relu(real_logits.float() - fake_anchor)
        below = F.relu(real_anchor - fake_logits.float())
        return above.square().mean() + below.square().mean()

    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Move the averages towards the mean logits of this update, taken over all ranks.

        Args:
            real_mean, fake_mean: mean logits on this rank.
        """
        means = all_reduce_mean(torch.stack([real_mean, fake_mean]).float())
        self.anchors = self.anchors.lerp(means, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a dict: "anchors" holds the averages for real images and reconstructions, (2,)."""
        return {"anchors": self.anchors}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the averages to those of a `state_dict`."""
        self.anchors = state["anchors"].to(self.anchors)


def adaptive_weight(
    recon: Tensor, last_layer: Tensor, *, nll_grad: Tensor, adversarial_grad: Tensor, cap: float
) -> Tensor:
    """Return VQGAN's weight |d nll / d W| / (|d adversarial / d W| + 1e-4), but at most `cap`.

    W is the decoder's last weight, `nll` the reconstruction loss and `adversarial` the GAN loss, as
    in arXiv:2012.09841, equation 7. The gradients with respect to ``recon`` are given, so each loss
    needs a backward pass through only one convolution. Norms are of gradients averaged over ranks.

    Args:
        recon: decoder output with its graph, (B, C, H, W).
        last_layer: W, the weight of the convolution that computed ``recon``.
        nll_grad: d nll / d recon, same shape as ``recon``.
        adversarial_grad: d adversarial / d recon, same shape as ``recon``.
        cap: upper limit of the result.

    Returns:
        A scalar without graph.
    """
    norms = []
    for grad in (nll_grad, adversarial_grad):
        (at_weight,) = torch.autograd.grad(recon, last_layer, grad_outputs=grad, retain_graph=True)
        norms.append(all_reduce_mean(at_weight).float().norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=cap)


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The discriminator, with the loss functions and weights to use in one update.

    Attributes:
        discriminator: the network without wrappers, for the model's loss. The model's loss needs
            only the gradient with respect to the reconstruction. Each rank has its own
            reconstructions, so this gradient needs no DDP.
        prepared: the same network wrapped by DDP and autocast, for the discriminator's update.
        factor: weight of the adversarial term in the model's loss in this update, not yet
            multiplied by the adaptive weight. See `objective.adversarial_weight`.
        loss: an entry of `GAN_LOSSES`.
        augment: names of the augmentations (see `diff_augment`) that are applied to all images
            before the discriminator gets them.
        r1_weight: weight of the R1 penalty in this update. 0 leaves out the penalty.
        lecam: object with the averages for the LeCam penalty. None leaves out the LeCam penalty.
            The training loop calls `LeCam.update` once per update.
        lecam_weight: weight of the LeCam penalty.
    """

    discriminator: nn.Module
    prepared: nn.Module
    factor: float
    loss: GANLoss = GAN_LOSSES["hinge"]
    augment: Sequence[str] = ()
    r1_weight: float = 0.0
    lecam: LeCam | None = None
    lecam_weight: float = 0.0
