"""The networks between images and latent vectors: dense layers, or residual convolutions.

Symbols: `B` batch, `C` image channels, `H W` image size, `M` parameter maps, `F` features.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "elu": nn.ELU, "silu": nn.SiLU}


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Return linear layers from each size to the next, each followed by the activation."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class DenseEncoder(nn.Module):
    """Map images (B, C, H, W) by dense layers to F features, (B, F)."""

    def __init__(self, shape: tuple[int, int, int], hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        self.layers = mlp([math.prod(shape), *hidden], activation)

    def forward(self, images: Tensor) -> Tensor:
        # the layers read 0 for black, as in the papers on binary digits
        return self.layers((images.flatten(1) + 1.0) / 2.0)


class DenseDecoder(nn.Module):
    """Map latents by dense layers to parameters of the pixels' distribution.

    N latents of U units, (N, U), become M maps of parameters, (N, M, H, W).
    """

    def __init__(
        self, units: int, hidden: Sequence[int], shape: tuple[int, int, int], activation: str
    ) -> None:
        super().__init__()
        self.shape = shape
        self.layers = mlp([units, *hidden], activation)
        self.last = nn.Linear(hidden[-1], math.prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.last(self.layers(z)).unflatten(-1, self.shape)

    @torch.no_grad()
    def start_at(self, bias: Tensor) -> None:
        """Set the biases of the last layer to `bias`, (M, H, W) for M parameter maps."""
        self.last.bias.copy_(bias.flatten())


class ResidualBlock(nn.Module):
    """Add the output of two successive 3 x 3 convolutions to that of a 3 x 3 skip convolution.

    A stride above 1 makes the maps smaller.
    """

    def __init__(self, inputs: int, outputs: int, activation: str, *, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(self.activation(self.first(x)))
        return self.activation(self.skip(x) + inner)


class ConvEncoder(nn.Module):
    """Images -> residual blocks of stride 2 -> dense layer -> F features, (B, F).

    The paper on inverse autoregressive flow (arXiv:1606.04934, appendix C.1) uses this network for
    images of digits, but with weight normalisation.
    """

    def __init__(
        self, shape: tuple[int, int, int], widths: Sequence[int], features: int, activation: str
    ) -> None:
        super().__init__()
        inputs = [shape[0], *widths[:-1]]
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(i, o, activation, stride=2)
                for i, o in zip(inputs, widths, strict=True)
            )
        )
        height, width = sides(shape[1:], len(widths))[-1]
        self.last = mlp([widths[-1] * height * width, features], activation)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.blocks(images).flatten(1))


class ConvDecoder(nn.Module):
    """Latents (N, U) -> dense layers -> upsampling residual blocks -> parameters (N, M, H, W).

    There are N latents of U units, and M maps of parameters of the pixels' distribution.
    """

    def __init__(
        self,
        units: int,
        features: int,
        widths: Sequence[int],
        shape: tuple[int, int, int],
        activation: str,
    ) -> None:
        super().__init__()
        self.sides = sides(shape[1:], len(widths))[::-1]
        height, width = self.sides[0]
        self.first = mlp([units, features, widths[-1] * height * width], activation)
        down = list(widths[::-1])
        outputs = [*down[1:], down[-1]]
        self.blocks = nn.ModuleList(
            ResidualBlock(i, o, activation) for i, o in zip(down, outputs, strict=True)
        )
        self.last = nn.Conv2d(outputs[-1], shape[0], 3, padding=1)
        self.bias = nn.Parameter(torch.zeros(shape))  # a separate bias for each position

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(-1, (-1, *self.sides[0]))
        for block, size in zip(self.blocks, self.sides[1:], strict=True):
            x = block(F.interpolate(x, size=size, mode="nearest"))
        return self.last(x) + self.bias

    @torch.no_grad()
    def start_at(self, bias: Tensor) -> None:
        """Set the learned bias of each position to `bias`, (M, H, W) for M parameter maps."""
        self.bias.copy_(bias)


def sides(size: Sequence[int], halvings: int) -> list[tuple[int, int]]:
    """Return the map size (H, W) after n convolutions of stride 2, for n from 0 to `halvings`."""
    found = [(size[0], size[1])]
    for _ in range(halvings):
        found.append(((found[-1][0] + 1) // 2, (found[-1][1] + 1) // 2))
    return found
