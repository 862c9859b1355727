"""Adapters change a decoder by low-rank matrices, and PEFT computes the same with them."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentvae.models.low_rank import (
    LowRank,
    adapter_tensors,
    adapters,
    add_adapters,
    merged,
    trained_weight,
)
from tests.tiny import TINY, images

RANK = 3


def adapted(*, strength: float = 0.1) -> Any:
    net = TINY["kl"](mid_block_add_attention=True)
    add_adapters(net, net.decoder, rank=RANK)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, _, adapter in adapters(net):
            adapter.up.normal_(std=strength)
    return net


@torch.no_grad()
def test_a_new_adapter_changes_nothing() -> None:
    net, stock = TINY["kl"](), TINY["kl"]()
    add_adapters(net, net.decoder, rank=RANK)
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(net.decode(z).sample, stock.decode(z).sample)


def test_only_the_decoders_adapters_learn_and_their_number_is_known() -> None:
    net, stock = adapted(), TINY["kl"]()
    layers = [m for m in stock.decoder.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    expected = sum(RANK * (len(m.weight) + m.weight[0].numel()) for m in layers)
    learned = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in learned.values()) == expected
    assert all(n.startswith("decoder.") and n.endswith((".up", ".down")) for n in learned)
    assert len(list(adapters(net))) == len(layers)
    assert any("to_q" in name for name, _, _ in adapters(net))


@torch.no_grad()
def test_the_merged_network_is_stock_and_computes_the_same() -> None:
    net, stock = adapted(), TINY["kl"]()
    found = merged(net)
    assert list(found.state_dict()) == list(stock.state_dict())
    assert [type(m) for m in found.modules()] == [type(m) for m in stock.modules()]
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(found.decode(z).sample, net.decode(z).sample)
    assert not torch.allclose(found.decode(z).sample, stock.decode(z).sample, atol=1e-3)
    latents = [one.encode(images(16, 16)).latent_dist.parameters for one in (found, stock)]
    assert torch.equal(*latents)

    # the change of each weight has the rank, at most
    old, new = stock.state_dict(), found.state_dict()
    for name, _, _ in adapters(net):
        change = (new[f"{name}.weight"] - old[f"{name}.weight"]).flatten(1)
        assert torch.linalg.matrix_rank(change, rtol=1e-4) <= RANK


@torch.no_grad()
def test_peft_adds_the_adapters_to_the_base(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    net, base = adapted(), TINY["kl"]()
    save_file(adapter_tensors(net), tmp_path / "pytorch_lora_weights.safetensors")
    base.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert sum("lora_A" in name for name, _ in base.named_parameters()) == len(list(adapters(net)))
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(
        base.decode(z).sample, merged(net).decode(z).sample, atol=1e-5, rtol=1e-5
    )


def test_gradients_are_those_of_the_full_weight_projected() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    adapter = LowRank(layer.weight, 2)
    nn.init.normal_(adapter.up)
    full = adapter(layer.weight).detach().requires_grad_()
    direction = torch.randn_like(full)
    adapter(layer.weight).backward(direction)
    flat = direction.flatten(1)
    torch.testing.assert_close(adapter.up.grad, flat @ adapter.down.T)
    torch.testing.assert_close(adapter.down.grad, adapter.up.T @ flat)
    bound = 1 / math.sqrt(4 * 9)  # PEFT's: uniform with the bound of a linear layer
    assert 0.5 * bound < adapter.down.abs().max() <= bound


def test_the_adversarial_weight_is_measured_where_the_last_layer_learns() -> None:
    net = adapted()
    weight = trained_weight(net.decoder.conv_out)
    assert weight.requires_grad and weight.shape == (3, RANK)
    stock = TINY["kl"]()
    assert trained_weight(stock.decoder.conv_out) is stock.decoder.conv_out.weight


def test_a_copy_has_adapters_of_its_own() -> None:
    net = adapted()
    other = copy.deepcopy(net)
    with torch.no_grad():
        next(iter(adapters(other)))[2].up.zero_()
    assert next(iter(adapters(net)))[2].up.any()
