"""Spectral regularisation against torch's singular values."""

import torch
from torch import nn

from latentvae.models.hierarchical.spectral import spectral_penalty
from tests.models.hierarchical.nets import small_net


def _exact(net: nn.Module) -> torch.Tensor:
    norms = [
        torch.linalg.matrix_norm(module.weight.flatten(1), 2)
        for module in net.modules()
        if isinstance(module, nn.Conv2d)
    ]
    factors = [
        module.weight.abs().max() for module in net.modules() if isinstance(module, nn.BatchNorm2d)
    ]
    return torch.stack(norms + factors).sum()


def test_the_penalty_is_the_sum_of_the_largest_singular_values():
    for block in ("vdvae", "nvae"):
        net = small_net(block=block)
        torch.testing.assert_close(
            spectral_penalty(net, iterations=100), _exact(net), rtol=1e-3, atol=1e-3
        )
        assert 0.95 * _exact(net) < spectral_penalty(net) <= _exact(net) + 1e-3


def test_the_penalty_has_the_gradient_of_singular_values():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    spectral_penalty(conv, iterations=200).backward()
    found = conv.weight.grad
    assert found is not None
    expected = torch.autograd.grad(_exact(conv), conv.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_penalty_has_no_state():
    net = small_net()
    assert torch.equal(spectral_penalty(net), spectral_penalty(net))
    names = set(net.state_dict())
    spectral_penalty(net)
    assert set(net.state_dict()) == names
