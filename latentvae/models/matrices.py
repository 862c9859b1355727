"""Choose the weights of a network that the optimiser Muon may train."""

from collections.abc import Sequence
from typing import cast

from torch import nn


def muon_matrices(net: nn.Module, *, outer: Sequence[str]) -> list[nn.Parameter]:
    """Return the weights of convolutions and linear layers that require a gradient.

    Muon is made for layers inside a network, so the first and the last layer should be in `outer`.
    Convolutions in groups, such as depthwise ones, are left out too, because their weights are not
    matrices.

    Args:
        net: the network.
        outer: names of the layers and of the modules to leave out.
    """
    return [
        cast("nn.Parameter", part.weight)
        for name, part in net.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
        and getattr(part, "groups", 1) == 1
        and part.weight.requires_grad
        and not f"{name}.".startswith(tuple(f"{layer}." for layer in outer))
    ]
