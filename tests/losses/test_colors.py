"""What LPIPS and discriminators see of grey and of transparent images, in closed form."""

import pytest
import torch
from torch import Tensor, nn

from latentvae.losses.adversarial import GAN_LOSSES, Adversary
from latentvae.losses.colors import random_background, to_rgb
from latentvae.losses.objective import Objective
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.tasks.autoencoder.backward import backward_discriminator


def images(channels: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, channels, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1


def test_rgb_is_itself_and_grey_is_repeated() -> None:
    rgb, grey = images(3), images(1)
    assert to_rgb(rgb, 0.3) is rgb
    assert torch.equal(to_rgb(grey, 0.3), torch.cat([grey] * 3, dim=1))
    with pytest.raises(ValueError, match="got 2"):
        to_rgb(images(2))


def test_rgba_lies_over_the_background_as_in_8_bits() -> None:
    rgba, background = images(4), images(3)[:, :, :1, :1]
    alpha = (rgba[:, 3:] + 1) / 2
    unit = alpha * (rgba[:, :3] + 1) / 2 + (1 - alpha) * (background + 1) / 2
    assert torch.allclose(to_rgb(rgba, background), 2 * unit - 1)
    rgba[:, 3] = 1
    assert torch.allclose(to_rgb(rgba, background), rgba[:, :3])
    rgba[:, 3] = -1
    assert torch.equal(to_rgb(rgba), torch.zeros_like(rgba[:, :3]))


@pytest.mark.parametrize("channels", [1, 4])
def test_the_gradient_in_closed_form(channels: int) -> None:
    given = images(channels).requires_grad_()
    background, weight = images(3, seed=1)[:, :, :1, :1], images(3, seed=2)
    (to_rgb(given, background) * weight).sum().backward()
    assert given.grad is not None
    if channels == 1:
        expected = weight.sum(dim=1, keepdim=True)
    else:
        colour = weight * (given.detach()[:, 3:] + 1) / 2
        alpha = (weight * (given.detach()[:, :3] - background) / 2).sum(dim=1, keepdim=True)
        expected = torch.cat([colour, alpha], dim=1)
    assert torch.allclose(given.grad, expected)


def test_backgrounds_are_drawn_from_the_global_generator_for_alpha_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert random_background(images(3)) == random_background(images(1)) == 0
    assert torch.equal(torch.get_rng_state(), state)
    first = random_background(images(4))
    torch.manual_seed(3)
    again = random_background(images(4))
    assert isinstance(first, Tensor) and isinstance(again, Tensor)
    assert torch.equal(first, again) and first.shape == (3, 3, 1, 1)
    assert len(first.unique()) == 9 and first.abs().max() <= 1


def test_lpips_of_grey_and_of_rgba() -> None:
    lpips = PerceptualLoss(load_lpips("alex"))
    rgb, other = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(s)) * 2 - 1
                  for s in (0, 1))  # fmt: skip
    grey = (rgb[:, :1], other[:, :1])
    repeated = (image.repeat(1, 3, 1, 1) for image in grey)
    assert torch.allclose(lpips(*grey), lpips(*repeated))
    opaque = [torch.cat([image, torch.ones_like(image[:, :1])], dim=1) for image in (rgb, other)]
    assert torch.allclose(lpips(*opaque), lpips(rgb, other))
    clear = [torch.cat([image, -torch.ones_like(image[:, :1])], dim=1) for image in (rgb, other)]
    assert lpips(*clear).tolist() == [0, 0]  # whatever colours hide there


class Mean(nn.Module):
    """Asks for RGB and records it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, *shown: Tensor) -> Tensor:
        assert all(image.shape[1] == 3 for image in shown)
        self.seen += [image.detach() for image in shown]
        return self.weight * (shown[-1] - shown[0] if len(shown) > 1 else shown[0]).mean((1, 2, 3))


def test_objective_and_discriminator_see_the_same_background_in_image_and_reconstruction() -> None:
    real, recon = images(4), images(4, seed=1)
    background = images(3, seed=2)[:, :, :1, :1]
    perceptual, discriminator = Mean(), Mean()
    objective = Objective(rec_loss="l2", perceptual=perceptual, perceptual_scale=1.0, kl_scale=0.0)

    # the objective
    terms = objective.reconstruction_terms(real, recon, background=background)
    assert torch.allclose(
        terms["rec"].double(), (real - recon).square().mean((1, 2, 3))
    )  # alpha too
    assert torch.equal(perceptual.seen[0], to_rgb(real, background))
    assert torch.equal(perceptual.seen[1], to_rgb(recon, background))

    # the discriminator's step
    adversary = Adversary(
        discriminator=discriminator,
        prepared=discriminator,
        factor=1.0,
        loss=GAN_LOSSES["hinge"],
    )
    backward_discriminator(real, recon, adversary=adversary, background=background)
    both = torch.cat([to_rgb(real, background), to_rgb(recon, background)])
    assert torch.equal(discriminator.seen[0], both)

    # the gradient of the adversarial loss
    leaf = recon.clone().requires_grad_()
    value = objective.adversarial_value(leaf, adversary, background=background)
    (grad,) = torch.autograd.grad(value, leaf)
    assert grad.shape == recon.shape
    # hinge: the loss is minus the mean logit, the mean over batch, colours and pixels
    assert torch.allclose(grad[:, :3], -(recon[:, 3:] + 1) / 2 / (3 * 3 * 64))
