import math

import pytest
import torch
from torch import Tensor, nn

from latentvae.losses import adversarial
from latentvae.losses.adversarial import (
    GAN_LOSSES,
    LeCam,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    lazy_weight,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    r1_penalty,
)
from latentvae.losses.discriminators import PatchGAN, build_discriminator


def test_hinge_at_and_beyond_the_margins() -> None:
    one, zero = torch.ones(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)
    assert hinge_discriminator_loss(one, -one) == 0.0
    assert hinge_discriminator_loss(5 * one, -5 * one) == 0.0
    assert hinge_discriminator_loss(zero, zero) == 1.0
    assert hinge_discriminator_loss(-one, one) == 2.0
    assert hinge_generator_loss(3 * one) == -3.0


def test_non_saturating_is_the_cross_entropy_of_the_labels() -> None:
    real, fake = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    cross_entropy = nn.functional.binary_cross_entropy
    expected = cross_entropy(real.sigmoid(), torch.ones_like(real)) + cross_entropy(
        fake.sigmoid(), torch.zeros_like(fake)
    )
    torch.testing.assert_close(non_saturating_discriminator_loss(real, fake), expected)
    torch.testing.assert_close(
        non_saturating_generator_loss(fake), cross_entropy(fake.sigmoid(), torch.ones_like(fake))
    )
    zero = torch.zeros(2, 1)
    assert non_saturating_discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert non_saturating_generator_loss(zero).item() == pytest.approx(math.log(2))


def test_the_non_saturating_gradient_stays_where_the_discriminator_is_sure() -> None:
    logits = torch.tensor([-30.0, 0.0, 30.0], requires_grad=True)
    (grad,) = torch.autograd.grad(non_saturating_generator_loss(logits), logits)
    torch.testing.assert_close(grad * 3, torch.tensor([-1.0, -0.5, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_each_loss_moves_discriminator_and_generator_apart(name: str) -> None:
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    GAN_LOSSES[name].discriminator(real, fake).backward()
    assert real.grad is not None and (real.grad < 0).all()
    assert fake.grad is not None and (fake.grad > 0).all()
    (grad,) = torch.autograd.grad(GAN_LOSSES[name].generator(fake), fake)
    assert (grad < 0).all()
    assert GAN_LOSSES[name].discriminator(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


def test_r1_of_a_linear_discriminator_is_half_its_squared_weight() -> None:
    weight = torch.randn(3, 4, 5, requires_grad=True)
    penalty = r1_penalty(
        lambda images: (images * weight).sum(dim=(1, 2, 3)), torch.randn(6, 3, 4, 5)
    )
    torch.testing.assert_close(penalty, 0.5 * weight.square().sum())
    (grad,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(grad, weight)


def test_r1_takes_a_patch_discriminators_mean_logit() -> None:
    """Two patches, each a copy of one pixel: D = (x0 + x1) / 2, whose gradient's square is 1/2."""
    penalty = r1_penalty(lambda images: images, torch.randn(3, 1, 1, 2))
    assert penalty.item() == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["patch", "stylegan"])
def test_r1_and_its_gradient_against_finite_differences(kind: str) -> None:
    discriminator = build_discriminator(kind, image_size=(8, 12), channels=8, num_layers=1).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        return discriminator(x).flatten(1).mean(1).sum()

    step = 1e-6
    with torch.no_grad():
        slopes = [
            (score(images + step * e) - score(images - step * e)) / (2 * step)
            for e in torch.eye(images.numel(), dtype=torch.float64).view(-1, *images.shape)
        ]
    penalty = r1_penalty(discriminator, images)
    torch.testing.assert_close(
        penalty, 0.5 * torch.stack(slopes).square().sum() / 2, rtol=1e-5, atol=0
    )
    parameter = next(p for p in discriminator.parameters() if p.ndim == 4)
    (grad,) = torch.autograd.grad(penalty, parameter)
    direction, sides = torch.randn_like(parameter), []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * 1e-6 * direction
        sides.append(r1_penalty(discriminator, images).item())
        with torch.no_grad():
            parameter -= sign * 1e-6 * direction
    assert (grad * direction).sum().item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4)


def test_a_lazy_penalty_weighs_as_much_over_an_interval() -> None:
    weights = [lazy_weight(update, weight=0.5, interval=16) for update in range(32)]
    assert [i for i, weight in enumerate(weights) if weight] == [0, 16]
    assert sum(weights) == 32 * 0.5
    assert lazy_weight(7, weight=0.5, interval=1) == 0.5


def test_lecam_is_the_authors_formula_on_running_averages() -> None:
    lecam = LeCam(decay=0.9)
    real_average = fake_average = 0.0
    for _ in range(3):
        real, fake = torch.randn(4, 1, 2, 2) + 1, torch.randn(4, 1, 2, 2) - 1
        expected = sum(max(r - fake_average, 0) ** 2 for r in real.flatten().tolist()) / 16
        expected += sum(max(real_average - f, 0) ** 2 for f in fake.flatten().tolist()) / 16
        assert lecam.penalty(real, fake).item() == pytest.approx(expected, rel=1e-5)
        lecam.update(real.mean(), fake.mean())
        real_average = 0.9 * real_average + 0.1 * real.mean().item()
        fake_average = 0.9 * fake_average + 0.1 * fake.mean().item()


def test_lecam_leaves_logits_on_the_right_side_of_the_averages_alone() -> None:
    lecam = LeCam(decay=0.0)
    lecam.update(torch.tensor(1.0), torch.tensor(-2.0))  # averages of real and fake
    logits = {"real": torch.tensor([-3.0, 0.0]), "fake": torch.tensor([2.0, 0.0])}
    for each in logits.values():
        each.requires_grad_()
    lecam.penalty(logits["real"], logits["fake"]).backward()
    assert logits["real"].grad.tolist() == [0.0, 2.0]  # (0 - -2)^2 / 2
    assert logits["fake"].grad.tolist() == [0.0, -1.0]  # (1 - 0)^2 / 2


def test_lecam_goes_on_from_its_state_and_averages_over_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = LeCam(decay=0.5), LeCam(decay=0.5)
    first.update(torch.tensor(2.0), torch.tensor(-4.0))
    second.load_state_dict(first.state_dict())
    assert second.anchors.tolist() == [1.0, -2.0]
    other_rank = torch.tensor([3.0, 0.0])
    monkeypatch.setattr(adversarial, "all_reduce_mean", lambda mine: (mine + other_rank) / 2)
    second.update(torch.tensor(1.0), torch.tensor(-2.0))
    assert second.anchors.tolist() == [1.5, -1.5]
    assert first.anchors.tolist() == [1.0, -2.0]


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
    discriminator = PatchGAN(channels=16)
    images = torch.randn(3, 3, 128, 128, requires_grad=True)
    together = discriminator(images)
    torch.testing.assert_close(together[1:2], discriminator(images[1:2]), rtol=1e-4, atol=1e-5)
    no_norm = nn.Sequential(
        *[layer for layer in discriminator.layers if not isinstance(layer, nn.GroupNorm)]
    )
    logits = no_norm(images)
    (grad,) = torch.autograd.grad(logits[0, 0, 7, 7], images)
    rows = grad[0].abs().sum(dim=(0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70
