"""The logit-Laplace loss against other computations of its density."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Laplace, SigmoidTransform, TransformedDistribution

from latentvae.errors import UserError
from latentvae.likelihoods import LogitLaplace
from latentvae.losses.logit_laplace import logit_laplace
from latentvae.proofs.preflight import preflight
from tests.proofs.injection import around
from tests.tasks.autoencoder.small import small_config
from tests.tiny import images

INSIDE, PIXELS = images(4, 5), -images(4, 5).flip(2)


def test_it_is_the_likelihood_of_dall_e_with_scale_1() -> None:
    mu = torch.logit(0.5 + 0.4 * INSIDE)
    expected = LogitLaplace().nll(PIXELS, torch.cat([mu, torch.zeros_like(mu)], dim=1))
    torch.testing.assert_close(logit_laplace(INSIDE, PIXELS), expected)


def test_it_is_a_density_of_mapped_pixels() -> None:
    """Pixels of [-1.25, 1.25] are all of (0, 1). There the density has the integral 1."""
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = TransformedDistribution(
        Laplace(torch.tensor(0.7).double(), 1.0), [SigmoidTransform()]
    )
    recon = (torch.sigmoid(torch.tensor(0.7).double()) - 0.5) / 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        found = -logit_laplace(recon, (x - 0.5) / 0.4)
    torch.testing.assert_close(found, density.log_prob(x))
    assert found.exp().mean().item() == pytest.approx(1.0, abs=1e-5)


def test_its_minimum_is_the_image_and_its_gradient_is_finite_everywhere() -> None:
    recon = torch.linspace(-50, 50, 1001).requires_grad_()
    logit_laplace(recon, torch.full((1001,), 0.3)).sum().backward()
    grad = recon.grad
    assert grad is not None and grad.isfinite().all()
    assert torch.equal(grad.sign(), (recon.detach() - 0.3).sign())
    assert grad.abs().max() <= 0.4 / 0.09 + 1e-4 and grad.abs().min() >= 1.6 - 1e-4
    edge = torch.tensor([0.9999, 1.0001], requires_grad=True)
    logit_laplace(edge, torch.zeros(2)).sum().backward()
    assert edge.grad is not None and edge.grad[0] == pytest.approx(edge.grad[1].item(), rel=1e-3)


@pytest.mark.usefixtures("own_accelerate")
@pytest.mark.parametrize("fault", [False, True])
def test_preflight_computes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, fault: bool
) -> None:
    if fault:
        name = "latentvae.losses.objective.objective:logit_laplace"
        around(name, lambda original, *pair: 3 * original(*pair))(monkeypatch)
    config = small_config(tmp_path / "run", train_batch_size=2, logit_laplace_scale=0.1)
    assert preflight(config) == fault
    said = capsys.readouterr().out
    assert ("FAILED logit-laplace" in said) == fault and said.count("FAILED") == fault
    assert "logit-laplace" in said


def test_it_needs_pixels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logit_laplace_scale 0\.1 needs a decoder that returns"):
        model = {"architecture": "vq", "likelihood": "logit_laplace"}
        small_config(tmp_path, model, logit_laplace_scale=0.1, learn_logvar=False)
