"""The residual cells of NVAE (arXiv:2007.03898, section 3.1), written from the paper's figures.

A cell is a residual block: 0.1 times the output of its layers is added to the cell's input. The
layers of an encoder cell are: batch norm, Swish, 3x3 convolution, batch norm, Swish, 3x3
convolution, squeeze and excitation. The layers of a decoder cell for C channels are: batch norm,
1x1 convolution to 6 C channels, batch norm, Swish, depthwise 5x5 convolution, batch norm, Swish,
1x1 convolution to C channels, batch norm, squeeze and excitation.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from latentvae.models.hierarchical.blocks import Residual, convolution

# Two numbers from the paper: the weight of a new batch in the running averages of batch norm, and
# the factor on a cell's output.
_MOMENTUM = 0.05
_CELL_GAIN = 0.1
_EXPANSION = 6


class SqueezeExcite(nn.Module):
    """Multiply each channel by a factor in (0, 1) that depends on the means of all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        middle = max(width // 16, 4)
        self.layers = nn.Sequential(
            nn.Linear(width, middle), nn.ReLU(), nn.Linear(middle, width), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layers(x.mean((2, 3)))[:, :, None, None]


class Scaled(nn.Module):
    """Multiply the input by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@dataclass(frozen=True)
class NvaeStyle:
    """Residual blocks ("cells") of NVAE, with batch norm, Swish, and squeeze and excitation.

    A block of the decoder has two cells, as in all networks of NVAE's paper.
    """

    has_batch_norm = True

    def encoder_block(self, width: int, *, resolution: int, gain: float) -> nn.Module:
        layers = [
            *(_norm(width), nn.SiLU(), convolution(width, width, 3)),
            *(_norm(width), nn.SiLU(), convolution(width, width, 3)),
            SqueezeExcite(width),
            Scaled(_CELL_GAIN),
        ]
        return Residual(nn.Sequential(*layers))

    def decoder_block(self, width: int, *, resolution: int, gain: float) -> nn.Module:
        return nn.Sequential(self._decoder_cell(width), self._decoder_cell(width))

    def _decoder_cell(self, width: int) -> nn.Module:
        inner = _EXPANSION * width
        depthwise = nn.Conv2d(inner, inner, 5, padding=2, groups=inner, bias=False)
        layers = [
            *(_norm(width), nn.Conv2d(width, inner, 1, bias=False)),
            *(_norm(inner), nn.SiLU(), depthwise),
            *(_norm(inner), nn.SiLU(), nn.Conv2d(inner, width, 1, bias=False)),
            *(_norm(width), SqueezeExcite(width)),
            Scaled(_CELL_GAIN),
        ]
        return Residual(nn.Sequential(*layers))

    def head(
        self, width: int, inner: int, out: int, *, resolution: int, zero: bool = False
    ) -> nn.Module:
        gain = 0.0 if zero else 1.0
        return nn.Sequential(nn.ELU(), convolution(width, out, 1 if zero else 3, gain=gain))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, momentum=_MOMENTUM, eps=1e-5)
