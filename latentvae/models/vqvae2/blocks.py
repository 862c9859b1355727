"""Encoder, decoder and smaller parts of VQ-VAE-2, all convolutional (arXiv:1906.00446, table 4).

`B` batch, `C` image channels, `D` code width, `H W` image size.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Add to x the output of two convolutions: 3 x 3 to `inner` channels, then 1 x 1 back."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, inner, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Encoder(nn.Module):
    """Encode images (B, C, H, W) to the features of each level, coarsest first.

    Args:
        channels: number of image channels C.
        widths: number of channels after each halving of the resolution.
        levels: number of levels. Each of the last `levels` halvings gives the features of a level.
        layers: number of residual blocks of each level.
        inner: number of channels inside a residual block.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], *, levels: int, layers: int, inner: int
    ) -> None:
        super().__init__()
        self.levels = levels
        self.conv_in = _halve(channels, widths[0])
        blocks = []
        for i, width in enumerate(widths):
            parts: list[nn.Module] = [] if i == 0 else [_halve(widths[i - 1], width)]
            parts.append(nn.ReLU())
            if i >= len(widths) - levels:
                parts += [nn.Conv2d(width, width, 3, padding=1), *_stack(width, layers, inner)]
            blocks.append(nn.Sequential(*parts))
        self.down_blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, features = self.conv_in(images), []
        for block in self.down_blocks:
            x = block(x)
            features.append(x)
        return features[: -self.levels - 1 : -1]


class Decoder(nn.Module):
    """Decode the joined codes of all levels to images (B, C, H, W).

    Args:
        channels: number of channels of the input.
        out_channels: number of image channels C.
        widths: number of channels after each halving of the resolution, from the image's resolution
            to that of the decoder's input.
        layers, inner: as in `Encoder`.
    """

    def __init__(
        self, channels: int, out_channels: int, widths: Sequence[int], *, layers: int, inner: int
    ) -> None:
        super().__init__()
        down = list(reversed(widths))
        self.conv_in = nn.Conv2d(channels, down[0], 3, padding=1)
        blocks = [nn.Sequential(*_stack(down[0], layers, inner))]
        for width, finer in pairwise(down):
            blocks.append(nn.Sequential(_double(width, finer), nn.ReLU()))
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_out = _double(widths[0], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(x)


class Condition(nn.Sequential):
    """Map codes of a level to an additional input of the next finer level's quantiser.

    Codes of width D, (B, D, h, w), become maps (B, D, 2 h, 2 w).
    """

    def __init__(self, code_channels: int, width: int, *, layers: int, inner: int) -> None:
        super().__init__(
            nn.Conv2d(code_channels, width, 3, padding=1),
            *_stack(width, layers, inner),
            _double(width, code_channels),
        )


class Upsample(nn.Sequential):
    """Upsample codes of width D, (B, D, h, w), to the channels and size of the decoder's input."""

    def __init__(self, code_channels: int, out_channels: int, *, doublings: int) -> None:
        widths = [code_channels, *[out_channels] * doublings]
        layers: list[nn.Module] = []
        for width, finer in pairwise(widths):
            layers += [_double(width, finer), nn.ReLU()]
        super().__init__(*layers[:-1] or [nn.Conv2d(code_channels, out_channels, 1)])


def _stack(width: int, layers: int, inner: int) -> list[nn.Module]:
    return [*(ResidualBlock(width, inner) for _ in range(layers)), nn.ReLU()]


def _halve(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 4, stride=2, padding=1)


def _double(channels: int, width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1)
