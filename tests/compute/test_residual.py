"""The plain residual block is the stock one to the bit; what it is not meant for stays."""

import copy
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D

from latentvae.compute.inference import InPlaceResnetBlock2D, build_exact
from latentvae.compute.residual import PlainResnetBlock2D, is_plain, plain_blocks
from latentvae.compute.stock_layers import restore_stock_layers
from latentvae.compute.strips.network import check_supported
from latentvae.models import build_autoencoder_kl


def kl() -> Any:
    torch.manual_seed(0)
    return build_autoencoder_kl(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


def test_a_network_gives_the_same_to_the_bit_and_is_stock_again_afterwards() -> None:
    net = kl()
    stock = copy.deepcopy(net)
    # A residual block or more of each half, two in the middle.
    assert plain_blocks(net) == sum(type(m) is ResnetBlock2D for m in stock.modules()) > 6
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for each in (net, stock):
        each(x).sample.square().mean().backward()
    for ours, theirs in zip(net.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x).sample, stock(x).sample)
    restore_stock_layers(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in stock.modules()]
    assert list(net.state_dict()) == list(stock.state_dict())


def test_a_network_in_training_is_served_by_exact_and_by_strips() -> None:
    net = kl()
    plain_blocks(net)
    exact = build_exact(net)
    assert not any(type(m) is PlainResnetBlock2D for m in exact.modules())
    assert any(type(m) is InPlaceResnetBlock2D for m in exact.modules())
    assert any(type(m) is PlainResnetBlock2D for m in net.modules())  # itself keeps its own
    check_supported(net)


def test_blocks_of_unets_and_scaled_sums_stay() -> None:
    def block(**options: Any) -> ResnetBlock2D:
        return ResnetBlock2D(in_channels=8, groups=4, **{"temb_channels": None} | options)

    assert is_plain(block()) and is_plain(block(dropout=0.1, out_channels=4))
    others = [
        block(temb_channels=16),
        block(up=True),
        block(down=True),
        block(output_scale_factor=2.0),
        block(non_linearity="relu"),
    ]
    for other in others:
        assert not is_plain(other)
        assert plain_blocks(other) == 0 and type(other) is ResnetBlock2D


def test_dropout_stays() -> None:
    options: dict[str, Any] = {"temb_channels": None, "dropout": 0.5}
    block = ResnetBlock2D(in_channels=8, groups=4, **options)
    stock = copy.deepcopy(block)
    assert plain_blocks(block) == 1 and type(block) is PlainResnetBlock2D
    x = torch.randn(1, 8, 4, 4)
    results = []
    for each in (block, stock):
        torch.manual_seed(0)
        results.append(each(x, None))
    assert torch.equal(*results) and not torch.equal(block(x, None), results[0])
