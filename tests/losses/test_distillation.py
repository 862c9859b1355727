"""The loss of a student is the sum that its docstring says, and noise has the asked size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.losses.distillation import DistillationLoss, Taught, noisy
from latentvae.losses.perceptual import PerceptualLoss, load_lpips


@pytest.fixture(scope="module")
def lpips() -> PerceptualLoss:
    return PerceptualLoss(load_lpips("alex"))


def batch() -> tuple[Taught, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    images, theirs, recon = (torch.rand(3, 2, 3, 32, 32, generator=draws) * 2 - 1).unbind()
    z, ours = torch.randn(2, 2, 4, 8, 8, generator=draws).unbind()
    return Taught(images, theirs, z), recon.requires_grad_(), ours.requires_grad_()


@pytest.mark.parametrize("rec_loss", ["l1", "l2"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_it_is_the_documented_sum(rec_loss: str, share: float, lpips: PerceptualLoss) -> None:
    taught, recon, z = batch()
    loss = DistillationLoss(
        rec_loss=rec_loss,
        perceptual=lpips,
        perceptual_scale=0.7,
        teacher_share=share,
        latent_scale=2.0,
    )
    total, log = loss(taught, recon, z)
    error = {"l1": F.l1_loss, "l2": F.mse_loss}[rec_loss]
    assert taught.recon is not None
    expected = 2.0 * (z - taught.z).square().mean()
    for weight, target in ((1 - share, taught.images), (share, taught.recon)):
        distance = error(recon, target) + 0.7 * lpips(target, recon).mean()
        expected = expected + weight * distance
    torch.testing.assert_close(total, expected)
    assert ("loss/rec" in log) == (share < 1) and ("loss/rec_teacher" in log) == (share > 0)

    ours = torch.autograd.grad(total, [recon, z])
    for found, wanted in zip(ours, torch.autograd.grad(expected, [recon, z]), strict=True):
        torch.testing.assert_close(found, wanted)


def test_parts_that_do_not_learn_have_no_term(lpips: PerceptualLoss) -> None:
    taught, recon, z = batch()
    options = {"rec_loss": "l1", "perceptual_scale": 0.0, "teacher_share": 0.0, "latent_scale": 1.0}
    loss = DistillationLoss(perceptual=lpips, **options)  # type: ignore[arg-type]
    assert set(loss(taught, recon, None)[1]) == {"loss/rec"}
    assert set(loss(taught, None, z)[1]) == {"loss/latent"}


def test_noise_is_uniform_from_0_to_its_share_of_the_latents() -> None:
    torch.manual_seed(0)
    z = 5.0 * torch.randn(400, 4, 16, 16)
    std = (noisy(z, 0.6) - z).flatten(1).std(dim=1)
    assert std.max() < 0.6 * 5 * 1.1 and std.min() < 0.05 * 5
    assert std.mean() == pytest.approx(0.3 * 5, rel=0.1)
    assert noisy(z, 0.0) is z
