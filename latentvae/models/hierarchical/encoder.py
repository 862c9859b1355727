"""The bottom-up half of a hierarchical VAE: features of an image at every resolution.

`B` batch, `W` channels of a resolution.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.models.hierarchical.blocks import Style, convolution, residual_gain
from latentvae.models.hierarchical.layers import Layer

Features = dict[int, list[Tensor]]


class Encoder(nn.Module):
    """Residual blocks, with average pooling between resolutions.

    Args:
        channels: number of input channels. The caller folds squares of pixels into channels.
        layers: the blocks, finest first.
        widths: number of channels of each resolution.
        style: builds the blocks, see `blocks.Style`.
        keep_all: return all features of a resolution, not only the last ones.
    """

    def __init__(
        self,
        channels: int,
        layers: Sequence[Layer],
        widths: Mapping[int, int],
        style: Style,
        *,
        keep_all: bool,
    ) -> None:
        super().__init__()
        self.layers, self.widths = tuple(layers), dict(widths)
        gain = residual_gain(len(layers))
        self.conv_in = convolution(channels, widths[layers[0].resolution], 3)
        self.blocks = nn.ModuleList(
            [
                style.encoder_block(
                    widths[layer.resolution], resolution=layer.resolution, gain=gain
                )
                for layer in layers
            ]
        )
        self.gradient_checkpointing = False
        self.keep_all = keep_all

    def forward(self, images: Tensor) -> Features:
        """Return for each resolution a list of features (B, W, side, side) with W channels."""
        x = self.conv_in(images)
        found: Features = {x.shape[-1]: [x]}
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x = run(self, block, x)
            if layer.pool > 1:
                x = F.avg_pool2d(x, layer.pool)
            side = layer.resolution // layer.pool
            x = with_channels(x, self.widths[side])
            found[side] = [*found.get(side, []), x] if self.keep_all else [x]
        return found


def run(parent: nn.Module, block: nn.Module, *args: Any) -> Any:
    """Call a block, with gradient checkpointing if it is enabled in `parent`."""
    if torch.is_grad_enabled() and parent.gradient_checkpointing:
        checkpoint: Any = parent._gradient_checkpointing_func
        return checkpoint(block, *args)
    return block(*args)


def with_channels(x: Tensor, width: int) -> Tensor:
    """Return maps with `width` channels: leave out the last channels, or append zeros."""
    missing = width - x.shape[1]
    if missing > 0:
        return F.pad(x, (0, 0, 0, 0, 0, missing))
    return x[:, :width]
