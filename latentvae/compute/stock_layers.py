"""Put the stock layers back in place of those that compute faster in training."""

from torch import nn

from latentvae.compute.upsampling import unfold_upsampling
from latentvae.compute.winograd.convolutions import restore_convolutions


def restore_stock_layers(net: nn.Module) -> None:
    """Restore the layers of `net` that it has when it is loaded back. Parameters stay."""
    unfold_upsampling(net)
    restore_convolutions(net)
