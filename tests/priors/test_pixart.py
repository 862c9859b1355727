"""The PixArt network starts at zero, reads texts without their padding, and is guided by text."""

from typing import Any

import torch
from torch import Tensor

from latentvae.priors.dit import sample_latents, velocity
from latentvae.priors.flow_matching import FlowSampling
from latentvae.priors.pixart import build_pixart
from latentvae.priors.text import join_texts, repeat_text
from latentvae.priors.transformer import Text


def small(*, patch_size: int = 1) -> Any:
    torch.manual_seed(0)
    return build_pixart(
        channels=2, side=4, text_channels=6, width=32, depth=2, head_dim=16, patch_size=patch_size
    )


def trained(**options: int) -> Any:
    """A network whose zero layers are not zero any more."""
    net = small(**options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def texts(*lengths: int) -> Text:
    """Random texts of these lengths, with random states as padding."""
    states = torch.randn(len(lengths), max(lengths), 6)
    return Text(states, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def batch(count: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 4, 4), torch.linspace(0.1, 1.0, count)


def test_a_new_network_predicts_zero_and_every_weight_learns() -> None:
    net, (x, sigma), condition = small(), batch(), texts(3, 1, 2)
    assert velocity(net, x, sigma, condition).abs().max() == 0

    # the text enters bit by bit
    torch.nn.init.normal_(net.proj_out.weight)
    other = texts(3, 1, 2)
    torch.testing.assert_close(
        velocity(net, x, sigma, condition), velocity(net, x, sigma, other), atol=0, rtol=0
    )

    net = trained()
    velocity(net, x, sigma, condition).square().sum().backward()
    silent = [
        name
        for name, p in net.named_parameters()
        if not name.endswith("to_k.bias") and (p.grad is None or not p.grad.any())
    ]  # softmax ignores the bias of keys
    assert not silent


@torch.no_grad()
def test_padding_changes_no_velocity() -> None:
    net, (x, sigma), long = trained(), batch(), texts(3, 1, 2)
    found = velocity(net, x, sigma, long)
    for row, length in enumerate((3, 1, 2)):
        alone = Text(long.states[row : row + 1, :length], long.mask[row : row + 1, :length])
        expected = velocity(net, x[row : row + 1], sigma[row : row + 1], alone)
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-4)

    # texts of several batches, padded to one length
    both = join_texts([texts(1), repeat_text(texts(4), 2)])
    assert both.mask.sum(dim=1).tolist() == [1, 4, 4]
    assert both.states.shape == (3, 4, 6)


def test_guidance_extrapolates_from_the_empty_text() -> None:
    net, condition, empty = trained(patch_size=2), texts(3, 2), texts(1)
    once = {
        g: sample_latents(
            net, condition, unconditional=empty, options=FlowSampling(g, steps=1), shift=1.0
        )
        for g in (0.0, 1.0, 3.0)
    }
    assert (once[1.0] - once[0.0]).abs().max() > 1e-3
    torch.testing.assert_close(once[3.0], once[0.0] + 3 * (once[1.0] - once[0.0]))
    without = sample_latents(net, repeat_text(empty, 2), options=FlowSampling(steps=1), shift=1.0)
    torch.testing.assert_close(once[0.0], without)
