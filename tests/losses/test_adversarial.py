import torch
from torch import nn

from latentvae.losses.adversarial import adaptive_weight, hinge_critic_loss, hinge_generator_loss
from latentvae.losses.discriminators import PatchGAN


def test_hinge_at_and_beyond_the_margins() -> None:
    one, zero = torch.ones(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)
    assert hinge_critic_loss(one, -one) == 0.0
    assert hinge_critic_loss(5 * one, -5 * one) == 0.0
    assert hinge_critic_loss(zero, zero) == 1.0
    assert hinge_critic_loss(-one, one) == 2.0
    assert hinge_generator_loss(3 * one) == -3.0


def test_adaptive_weight_is_the_ratio_of_full_gradients_at_the_last_layer() -> None:
    decoder = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3))
    last = decoder[2].weight
    recon = decoder(torch.randn(2, 2, 9, 9))
    nll, adversarial = recon.square().mean(), recon.sin().mean()
    norms = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, adversarial)
    ]
    grads = [torch.autograd.grad(loss, recon, retain_graph=True)[0] for loss in (nll, adversarial)]
    weight = adaptive_weight(recon, last, nll_grad=grads[0], adversarial_grad=grads[1], cap=1e4)
    torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4))
    assert adaptive_weight(
        recon, last, nll_grad=grads[0], adversarial_grad=grads[1], cap=0.01
    ).item() == torch.tensor(0.01)


def test_patchgan_judges_each_image_alone_and_sees_70_pixels() -> None:
    critic = PatchGAN(channels=16)
    images = torch.randn(3, 3, 128, 128, requires_grad=True)
    together = critic(images)
    torch.testing.assert_close(together[1:2], critic(images[1:2]), rtol=1e-4, atol=1e-5)
    no_norm = nn.Sequential(
        *[layer for layer in critic.layers if not isinstance(layer, nn.GroupNorm)]
    )
    logits = no_norm(images)
    (grad,) = torch.autograd.grad(logits[0, 0, 7, 7], images)
    rows = grad[0].abs().sum(dim=(0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70
