"""Replace the faster layers that training uses by the original layers of diffusers and torch."""

from torch import nn

from latentvae.compute.upsampling import unfold_upsampling
from latentvae.compute.winograd.convolutions import restore_convolutions


def restore_stock_layers(net: nn.Module) -> None:
    """Replace the faster layers of `net` by those of diffusers and torch. Weights do not change."""
    unfold_upsampling(net)
    restore_convolutions(net)
