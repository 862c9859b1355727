"""The objective against Stable Diffusion's sums, written out."""

import math

import pytest
import torch
from torch import Tensor, nn

from latentvae.losses.objective import Objective
from latentvae.outputs import AutoencoderOutput, Latent


class Blur(nn.Module):
    """Stands in for LPIPS: a distance per image."""

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        return (images.mean(dim=(2, 3)) - recon.mean(dim=(2, 3))).square().sum(dim=1)


@pytest.mark.parametrize("rec_loss", ["l1", "l2"])
@pytest.mark.parametrize("logvar", [0.0, -1.5])
def test_equals_latent_diffusions_sums_divided_by_the_image_elements(
    rec_loss: str, logvar: float
) -> None:
    images, recon = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    kl = torch.tensor([120.0, 30.0])
    objective = Objective(rec_loss=rec_loss, perceptual=Blur(), perceptual_scale=0.7, kl_scale=1e-6)
    out = AutoencoderOutput(
        recon=recon, latents=(Latent(kl=kl),), output_logvar=torch.tensor(logvar)
    )
    ours = objective(images, out, update=0).total

    pixel = (images - recon).abs() if rec_loss == "l1" else (images - recon).square()
    error = pixel + 0.7 * Blur()(images, recon)[:, None, None, None]
    theirs = (error / math.exp(logvar) + logvar).sum() / 2 + 1e-6 * kl.sum() / 2
    torch.testing.assert_close(ours, theirs / (3 * 8 * 8))


def test_learned_logvar_has_its_minimum_at_the_log_of_the_error() -> None:
    logvar = torch.tensor(0.3, requires_grad=True)
    objective = Objective(rec_loss="l2", perceptual=None, perceptual_scale=0.0, kl_scale=0.0)
    for value, sign in ((math.log(0.04) - 0.1, -1), (math.log(0.04) + 0.1, 1)):
        logvar.data.fill_(value)
        (grad,) = torch.autograd.grad(objective.nll({"rec": torch.tensor([0.04])}, logvar), logvar)
        assert math.copysign(1, grad.item()) == sign


def test_no_term_depends_on_resolution_or_batch() -> None:
    objective = Objective(rec_loss="l1", perceptual=None, perceptual_scale=0.0, kl_scale=1.0)
    values = []
    for batch, side in ((1, 8), (3, 32)):
        images = torch.full((batch, 3, side, side), 0.5)
        kl = torch.full((batch,), 2.0 * (side // 8) ** 2)  # two nats per latent pixel
        out = AutoencoderOutput(
            recon=-images, latents=(Latent(kl=kl),), output_logvar=torch.zeros(())
        )
        values.append(objective(images, out, update=0).total.item())
    assert values[0] == pytest.approx(values[1])
