"""Replace the faster layers of training by the stock layers of diffusers and torch."""

from torch import nn

from latentvae.compute.upsampling import unfold_upsampling
from latentvae.compute.winograd.convolutions import restore_convolutions


def restore_stock_layers(net: nn.Module) -> None:
    """Replace the faster layers of `net` by stock layers. Parameters do not change."""
    unfold_upsampling(net)
    restore_convolutions(net)
