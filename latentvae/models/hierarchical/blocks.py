"""The blocks of Very Deep VAE (arXiv:2011.10650), and the interface of a style of blocks.

A style is a class that builds all blocks of a network.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

ActivationName = Literal["gelu", "silu"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU}


class Style(Protocol):
    """Interface of a style, an object that builds the blocks of a hierarchical VAE.

    `width` is a number of channels, and `resolution` is the side of the feature maps. `gain` is a
    factor on the initial weights of the last layer of a residual block. A style may ignore `gain`.
    """

    has_batch_norm: bool

    def encoder_block(self, width: int, *, resolution: int, gain: float) -> nn.Module:
        """Return a residual block of the encoder."""
        ...

    def decoder_block(self, width: int, *, resolution: int, gain: float) -> nn.Module:
        """Return a residual block of the decoder."""
        ...

    def head(
        self, width: int, inner: int, out: int, *, resolution: int, zero: bool = False
    ) -> nn.Module:
        """Return the layers that predict the parameters of a Gaussian.

        Args:
            width: channels of the input.
            inner: channels of the decoder's maps, which decide the number of hidden channels.
            out: channels of the output.
            resolution: side of the maps, in positions.
            zero: whether the layers predict zeros at the start of the training.
        """
        ...


class Residual(nn.Module):
    """Add the output of some layers to their input."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@dataclass(frozen=True)
class VdvaeStyle:
    """Bottleneck blocks of four convolutions (1x1, 3x3, 3x3, 1x1), each after an activation.

    The blocks have no normalisation. On maps of side 1 and 2, all convolutions are 1x1.

    Args:
        bottleneck_multiple: channels inside a block, divided by the channels of the feature maps.
        activation: a key of `ACTIVATIONS`.
    """

    bottleneck_multiple: float
    activation: str

    has_batch_norm = False

    def encoder_block(self, width: int, *, resolution: int, gain: float) -> nn.Module:
        return self.decoder_block(width, resolution=resolution, gain=gain)

    def decoder_block(self, width: int, *, resolution: int, gain: float) -> nn.Module:
        return Residual(self._bottleneck(width, width, width, resolution, gain))

    def head(
        self, width: int, inner: int, out: int, *, resolution: int, zero: bool = False
    ) -> nn.Module:
        return self._bottleneck(width, inner, out, resolution, 0.0 if zero else 1.0)

    def _bottleneck(
        self, width: int, inner: int, out: int, resolution: int, gain: float
    ) -> nn.Sequential:
        middle = max(1, int(inner * self.bottleneck_multiple))
        side = 3 if resolution > 2 else 1
        convolutions = (
            convolution(width, middle, 1),
            convolution(middle, middle, side),
            convolution(middle, middle, side),
            convolution(middle, out, 1, gain=gain),
        )
        activation = ACTIVATIONS[self.activation]
        return nn.Sequential(*(layer for conv in convolutions for layer in (activation(), conv)))


def convolution(width: int, out: int, side: int, *, gain: float = 1.0) -> nn.Conv2d:
    """Return a convolution that keeps height and width, with initial bias 0.

    Its initial weights are torch's defaults, multiplied by `gain`.
    """
    layer = nn.Conv2d(width, out, side, padding=side // 2)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    layer.weight.data.mul_(gain)
    return layer


def residual_gain(num_blocks: int) -> float:
    """Return 1 / sqrt(number of blocks), a factor on the initial outputs of residual blocks.

    With this factor, the variance of the feature maps does not grow with the depth of the network.
    """
    return 1.0 / math.sqrt(num_blocks)
