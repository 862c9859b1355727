"""Residual blocks that are computed in place give the same as the stock ones."""

import copy
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from latentvae.compute.inference import InPlaceResnetBlock2D, build_exact
from latentvae.models import build_autoencoder_kl


def block(**options: Any) -> ResnetBlock2D:
    torch.manual_seed(0)
    return ResnetBlock2D(in_channels=8, groups=4, **{"temb_channels": None} | options)


def in_place(stock: ResnetBlock2D) -> Any:
    """Return the block that `build_exact` makes of one in an autoencoder."""
    net: Any = build_autoencoder_kl(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    net.encoder.down_blocks[0].resnets = nn.ModuleList([stock])
    return build_exact(net.eval()).encoder.down_blocks[0].resnets[0]


def test_every_block_of_an_autoencoder_is_computed_in_place() -> None:
    net = build_autoencoder_kl(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    exact = build_exact(net)
    assert not any(type(m) is ResnetBlock2D for m in exact.modules())
    count = sum(type(m) is InPlaceResnetBlock2D for m in exact.modules())
    # At least one residual block in each half, and two in the middle.
    assert count == sum(type(m) is ResnetBlock2D for m in net.modules()) > 6


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1, "out_channels": 4}])
def test_a_block_in_place_gives_what_the_stock_one_gives(options: dict[str, Any]) -> None:
    stock = block(**options).eval()
    ours = in_place(copy.deepcopy(stock))
    assert type(ours) is InPlaceResnetBlock2D
    x = torch.randn(2, 8, 6, 5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x.clone(), None), stock(x, None))


@pytest.mark.parametrize(
    "options",
    [
        {"temb_channels": 16},
        {"up": True},
        {"down": True},
        {"output_scale_factor": 2.0},
        {"non_linearity": "relu"},
    ],
)
def test_blocks_of_unets_and_scaled_sums_stay(options: dict[str, Any]) -> None:
    assert type(in_place(block(**options))) is ResnetBlock2D
