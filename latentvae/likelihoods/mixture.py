"""The discretised mixture of logistics of PixelCNN++ (arXiv:1701.05517, section 2.1 and 2.2).

Very Deep VAE (arXiv:2011.10650) and NVAE (arXiv:2007.03898) use this mixture for colour images.

Symbols: `B` batch size, `C` image channels, `H W` image size, `N` components of the mixture.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from latentvae.likelihoods.pixels import (
    MAX_LOG_SCALE,
    MIN_LOG_SCALE,
    DiscretizedLogistic,
    PixelDistribution,
)


class DiscretizedLogisticMixture(PixelDistribution):
    """A mixture of N logistic distributions for each pixel.

    All channels of a pixel belong to the same component.

    Within a component, the location of a channel depends linearly on the values of the channels
    before it. For C channels, the parameter maps are N logits, N C locations, N C values of
    ln(scale), and for each pair of channels N coefficients (before a tanh). For RGB images and
    N = 10, there are 100 maps.

    Args:
        levels: number of values that a pixel can have.
        components: number of components N.
    """

    def __init__(self, levels: int = 256, components: int = 10) -> None:
        super().__init__(levels)
        self.components = components
        self._logistic = DiscretizedLogistic(levels)

    def num_maps(self, channels: int) -> int:
        return self.components * (1 + 2 * channels + channels * (channels - 1) // 2)

    def _log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        logits, location, log_scale, pairs = self._parts(parameters, images.shape[1])
        values = images.unsqueeze(1).expand_as(location)
        location = location + _from_earlier_channels(values, pairs)

        log_p = self._logistic.log_mass(values, location, log_scale).sum(2)
        return torch.logsumexp(log_p + F.log_softmax(logits, dim=1), dim=1).flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the weighted mean of the components' locations as images (B, C, H, W).

        The values are not rounded to the values that a pixel can have.
        """
        logits, location, _, pairs = self._parts(parameters)
        centres: list[Tensor] = []
        for channel in range(location.shape[2]):
            shift = _shift(centres, pairs, channel)
            centres.append((location[:, :, channel] + shift).clamp(-1.0, 1.0))
        shares = logits.softmax(dim=1).unsqueeze(2)
        return (torch.stack(centres, dim=2) * shares).sum(1)

    def sample(self, parameters: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        logits, location, log_scale, pairs = self._parts(parameters)

        # a component for each pixel, by the Gumbel-max trick
        noise = torch.rand(logits.shape, generator=generator, device=logits.device)
        noise = noise.clamp(1e-6, 1.0 - 1e-6)
        chosen = (logits - torch.log(-torch.log(noise))).argmax(dim=1)
        location, log_scale, pairs = (_of(x, chosen) for x in (location, log_scale, pairs))

        # the channels of the pixel, one after the other
        drawn: list[Tensor] = []
        for channel in range(location.shape[2]):
            centre = location[:, :, channel] + _shift(drawn, pairs, channel)
            drawn.append(self._logistic.draw(centre, log_scale[:, :, channel], generator=generator))
        return torch.stack(drawn, dim=2).squeeze(1)

    def _parts(
        self, parameters: Tensor, channels: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the decoder's output split into logits, locations, ln(scale) and coefficients.

        The logits are (B, N, H, W) for N components. The other results are (B, N, ..., H, W), with
        one map for each channel (locations, ln(scale)) or pair of channels (coefficients).
        """
        count = self.components
        if channels is None:
            channels = next(c for c in range(1, 9) if self.num_maps(c) == parameters.shape[1])
        pairs = channels * (channels - 1) // 2
        parts = parameters.float().split(
            [count, count * channels, count * channels, count * pairs], dim=1
        )
        location, log_scale, coefficients = (
            rearrange(part, "b (n c) h w -> b n c h w", n=count) for part in parts[1:]
        )
        return (
            parts[0],
            location,
            log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE),
            torch.tanh(coefficients),
        )


def _from_earlier_channels(values: Tensor, pairs: Tensor) -> Tensor:
    """Return how much the earlier channels shift the location of each channel, (B, N, C, H, W).

    Args:
        values: pixel values for each of N components, (B, N, C, H, W).
        pairs: coefficient of each pair of channels, (B, N, pairs, H, W).
    """
    channels = list(values.unbind(dim=2))
    shifts = [_shift(channels[:c], pairs, c) for c in range(len(channels))]
    return torch.stack([shift + torch.zeros_like(channels[0]) for shift in shifts], dim=2)


def _shift(earlier: list[Tensor], pairs: Tensor, channel: int) -> Tensor | float:
    """Return how much the earlier channels shift the locations of a channel, (B, N, H, W).

    Args:
        earlier: values of the channels before this channel, (B, N, H, W) each.
        pairs: coefficient of each pair of channels, for each of N components.
        channel: index of the channel.
    """
    first = channel * (channel - 1) // 2
    return sum((pairs[:, :, first + i] * value for i, value in enumerate(earlier)), 0.0)


def _of(parts: Tensor, chosen: Tensor) -> Tensor:
    """Return the values of the component that was chosen for each pixel, (B, 1, ..., H, W)."""
    index = chosen[:, None, None].expand(-1, 1, parts.shape[2], -1, -1)
    return parts.gather(1, index)
