"""Muon, against torch's own on matrices, and AdamW beside it."""

import pytest
import torch
from torch import nn, optim

from latentvae.engine.muon import COEFFICIENTS, ITERATIONS, MuonWithAdamW, orthogonalized


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_it_is_the_iteration_in_float64(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape)
    a, b, c = COEFFICIENTS
    for matrix, found in zip(matrices, orthogonalized(matrices), strict=True):
        x = matrix.double()
        x = x.T if shape[0] > shape[1] else x
        x = x / x.norm()
        for _ in range(ITERATIONS):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        torch.testing.assert_close(
            found.double(), x.T if shape[0] > shape[1] else x, atol=1e-4, rtol=0
        )
        assert 0.3 < torch.linalg.svdvals(found).min() and torch.linalg.svdvals(found).max() < 1.3


def test_no_gradient_gives_no_step() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
def test_matrices_step_as_with_torchs_muon() -> None:
    """Torch iterates in bfloat16, so the steps agree to its precision."""
    ours = [nn.Parameter(torch.randn(8, 24)), nn.Parameter(torch.randn(16, 8))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = MuonWithAdamW(ours, [], lr=1e-3, muon_lr=1e-2, weight_decay=0.1)
    expected = optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in ours]
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        expected.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.03 * (q - before).norm()


def test_a_convolution_is_a_matrix_and_the_rest_has_adamw() -> None:
    conv = nn.Conv2d(4, 8, 3)
    other = nn.Conv2d(4, 8, 3)
    other.load_state_dict(conv.state_dict())
    weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
    ours = MuonWithAdamW([conv.weight], [conv.bias], lr=1e-3, muon_lr=2e-3, weight_decay=0.0)
    flat = MuonWithAdamW([weight], [], lr=1e-3, muon_lr=2e-3, weight_decay=0.0)
    adamw = optim.AdamW([other.bias], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        conv.weight.grad, conv.bias.grad = torch.randn_like(conv.weight), torch.randn(8)
        weight.grad = conv.weight.grad.flatten(1).clone()
        other.bias.grad = conv.bias.grad.clone()
        for optimizer in (ours, flat, adamw):
            optimizer.step()
    torch.testing.assert_close(conv.weight.flatten(1), weight)
    assert torch.equal(conv.bias, other.bias)
    assert ours.state[conv.weight].keys() == {"exp_avg"}


def test_the_rates_of_a_schedule_keep_their_ratio() -> None:
    """The engine sets one learning rate for all groups."""
    matrices = [nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    for rate, matrix in zip((1.0, 0.25), matrices, strict=True):
        optimizer = MuonWithAdamW([matrix], [], lr=1e-3, muon_lr=4e-3, weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = rate
        matrix.grad = torch.eye(4)
        optimizer.step()
    torch.testing.assert_close(matrices[0], 4 * matrices[1])
