"""Residual blocks as autoencoders have them: norm, SiLU and convolution, twice, and a shortcut."""

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class PlainResnetBlock2D(ResnetBlock2D):
    """Without the stock layer's division by one, which reads and writes every map once more,
    forward and backward; the same to the bit."""

    def forward(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        if self.conv_shortcut is None:
            return input_tensor + hidden
        x = input_tensor.contiguous() if self.training else input_tensor  # as the stock layer
        return self.conv_shortcut(x) + hidden


def plain_blocks(net: nn.Module) -> int:
    """Give the residual blocks of `net` that have nothing else the plain class; returns how many
    there are. Names, parameters and hooks stay."""
    found = [m for m in net.modules() if type(m) is ResnetBlock2D and is_plain(m)]
    for module in found:
        module.__class__ = PlainResnetBlock2D
    return len(found)


def restore_blocks(net: nn.Module) -> None:
    """Undo `plain_blocks`: the stock layers again."""
    found: list[nn.Module] = [m for m in net.modules() if type(m) is PlainResnetBlock2D]
    for module in found:
        module.__class__ = ResnetBlock2D


def is_plain(block: Any) -> bool:
    """Whether it has nothing that only U-Nets have, and its sum is not scaled."""
    return (
        block.time_emb_proj is None
        and block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm != "scale_shift"
        and block.output_scale_factor == 1.0
        and isinstance(block.norm1, nn.GroupNorm)
        and isinstance(block.nonlinearity, nn.SiLU)
    )
