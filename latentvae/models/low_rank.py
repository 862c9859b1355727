"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) of a decoder's matrices.

    add_adapters(net, net.decoder, rank=8)  # only the adapters learn
    merged(net)  # a network without adapters, with the same outputs
    adapter_tensors(net)  # the adapters in the format of the library PEFT

An adapter changes a layer's weight W to W + B A. For a convolution with a k x k kernel, A is
(r, I k k) and B is (O, r). B starts at 0, so the network's outputs are unchanged at first. The LoRA
of the library PEFT computes the same function with alpha = r.

PEFT would replace the layers by layers of PEFT's own classes. This module computes the weight by a
torch parametrization instead, and does not replace the layers. So the code for upsampling and
export works without changes, and all other weights keep their names.

`I` and `O` channels in and out, `r` rank.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from latentvae.models.network import Network


class LowRank(nn.Module):
    """A parametrization that adds the product B A to a weight.

    Args:
        weight: the weight of a convolution (O, I, k, k) or a linear layer (O, I), with I input and
            O output channels.
        rank: rank of the product.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel()))  # A
        self.up = nn.Parameter(torch.zeros(len(weight), rank))  # B
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as in PEFT

    def forward(self, weight: Tensor) -> Tensor:
        # Without autocast here, the sum is as precise as the weight that `merged` computes.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.up @ self.down).view_as(weight)


def add_adapters(net: Network, part: nn.Module, *, rank: int) -> None:
    """Freeze a network, and add an adapter to each convolution and linear layer in `part`."""
    net.requires_grad_(False)
    for layer in list(part.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def adapters(net: Network) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """Yield name, layer and adapter of each layer that has an adapter."""
    for name, layer in net.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            parts: Any = layer.parametrizations
            yield name, layer, cast(LowRank, parts.weight[0])


def trained_weight(layer: nn.Module) -> Tensor:
    """Return the trained weight of a layer: matrix B of its adapter, or the layer's own weight."""
    if parametrize.is_parametrized(layer, "weight"):
        parts: Any = layer.parametrizations
        return parts.weight[0].up
    return cast(Tensor, layer.weight)


@torch.no_grad()
def merged(net: Network) -> Any:
    """Return a network of the same class in which every adapter is added to its weight.

    torch's `remove_parametrizations` is not used, because it changes the class of a layer. A copy
    of a layer shares its class with the original layer in `net`, so `net` would break.
    """
    weights = {n: v for n, v in net.state_dict().items() if ".parametrizations." not in n}
    for name, layer, _ in adapters(net):
        weights[f"{name}.weight"] = cast(Tensor, layer.weight).detach()
    network: Any = type(net)
    with torch.device("meta"):  # draws no random numbers
        found = network.from_config({k: v for k, v in net.config.items() if k[0] != "_"})
    found.load_state_dict(weights, assign=True)
    return found.train(net.training)


def adapter_tensors(net: Network) -> dict[str, Tensor]:
    """Return all adapters with the names and shapes of the library PEFT, on the CPU."""
    tensors = {}
    for name, layer, adapter in adapters(net):
        down, up = (value.detach().cpu().clone() for value in (adapter.down, adapter.up))
        if isinstance(layer, nn.Conv2d):
            down = down.view(len(down), *cast(Tensor, layer.weight).shape[1:])
            up = up[:, :, None, None]
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors
