"""An invertible map of latents with a known Jacobian: coupling layers of convolutions and splines.

z (B, d, h, w) -> coupling -> ... -> coupling -> f(z) (B, d, h, w), log |det df/dz| (B,)

A coupling (Dinh et al. 2016, arXiv:1605.08803) leaves one part of its input as it is. A small
network reads the unchanged part and chooses an affine map and a spline (Durkan et al. 2019,
arXiv:1906.04032) for each element of the other part. The two parts of the input are the positions
of the two colours of a checkerboard, or two halves of the channels. The small network is
convolutional, so the map works for latents of any size. The affine maps and splines come from the
package zuko.

`B` batch, `d` latent channels, `h w` latent positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from zuko.transforms import ComposedTransform, MonotonicAffineTransform, MonotonicRQSTransform

BINS = 8  # number of bins of a spline
BOUND = 5.0  # outside [-BOUND, BOUND], the spline is the identity


class Coupling(nn.Module):
    """A coupling layer, which maps one part of a latent in a way that depends on the other part.

    At the start the map is the identity.

    Args:
        channels: number of latent channels d.
        width: number of hidden channels.
        pattern: which part is mapped. Patterns 0 and 1 map the positions of one colour of a
            checkerboard. Patterns 2 and 3 map one half of the channels.
    """

    def __init__(self, channels: int, width: int, *, pattern: int) -> None:
        super().__init__()
        self.pattern = pattern
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels * (3 * BINS + 1), 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mapped latents (B, d, h, w) and log |det| of the map's Jacobian, (B,)."""
        mapped = self.mapped_part(z)
        result, logs = self._map(z, mapped).call_and_ladj(z)
        return torch.where(mapped, result, z), (logs * mapped).sum(dim=(1, 2, 3))

    def inverse(self, result: Tensor) -> Tensor:
        """Return the latent that `forward` maps to `result`."""
        mapped = self.mapped_part(result)
        inverse: Any = self._map(result, mapped).inv
        return torch.where(mapped, inverse(result), result)

    def mapped_part(self, z: Tensor) -> Tensor:
        """Return a bool mask (d, h, w) that is True for the elements that the layer maps."""
        d, h, w = (torch.arange(side, device=z.device) for side in z.shape[1:])
        if self.pattern < 2:
            chosen = (h[:, None] + w) % 2 == self.pattern
            return chosen.expand(z.shape[1:])
        chosen = (2 * d >= len(d)) == (self.pattern == 2)
        return chosen[:, None, None].expand(z.shape[1:])

    def _map(self, z: Tensor, mapped: Tensor) -> ComposedTransform:
        """Return an elementwise map that depends on the part of `z` that stays unchanged."""
        hidden = F.silu(_convolved(self.first, z.masked_fill(mapped, 0.0)))
        hidden = F.silu(_convolved(self.middle, hidden))
        numbers = rearrange(_convolved(self.last, hidden), "b (d n) h w -> b d h w n", d=z.shape[1])
        shift, scale, widths, heights, slopes = numbers.split([1, 1, BINS, BINS, BINS - 1], dim=-1)
        return ComposedTransform(
            MonotonicAffineTransform(shift.squeeze(-1), scale.squeeze(-1)),
            MonotonicRQSTransform(widths, heights, slopes, bound=BOUND),
        )


class CouplingFlow(nn.Module):
    """A flow of coupling layers, which is the identity at the start.

        flow = CouplingFlow(4, layers=8, width=64)
        noise, log_determinant = flow(z)
        z = flow.inverse(noise)

    Args:
        channels: number of latent channels d.
        layers: number of coupling layers.
        width: number of hidden channels of each layer.
    """

    def __init__(self, channels: int, *, layers: int, width: int) -> None:
        super().__init__()
        patterns = 4 if channels > 1 else 2  # one channel cannot be split into halves
        self.layers = nn.ModuleList(
            Coupling(channels, width, pattern=i % patterns) for i in range(layers)
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mapped latents f(z), (B, d, h, w), and log |det df/dz|, (B,).

        Both results are float32, also under autocast.
        """
        with torch.autocast(z.device.type, enabled=False):
            result, log_determinant = z.float(), z.new_zeros(len(z), dtype=torch.float32)
            for layer in self.layers:
                result, own = layer(result)
                log_determinant = log_determinant + own
            return result, log_determinant

    def inverse(self, result: Tensor) -> Tensor:
        """Return the latent z with f(z) = `result`, (B, d, h, w), in float32."""
        with torch.autocast(result.device.type, enabled=False):
            z = result.float()
            for layer in reversed(self.layers):
                z = layer.inverse(z)  # type: ignore[operator]
            return z


def _convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the layer's output in the dtype of `x`, also if the weights have half precision."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.conv2d(x, layer.weight.to(x.dtype), bias, padding=layer.padding)  # type: ignore[arg-type]
