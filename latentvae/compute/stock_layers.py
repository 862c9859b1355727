"""The stock layers in the place of those that training computes with."""

from torch import nn

from latentvae.compute.upsampling import unfold_upsampling
from latentvae.compute.winograd.convolutions import restore_convolutions


def restore_stock_layers(net: nn.Module) -> None:
    """Let `net` compute what its classes do once it is loaded back; parameters stay."""
    unfold_upsampling(net)
    restore_convolutions(net)
