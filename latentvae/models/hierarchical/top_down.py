"""The top-down half of a hierarchical VAE: blocks with a prior, a posterior and a group of latents.

    x -> prior head -> p(z), shift
    x, encoder's features -> posterior head -> q(z)
    x + shift + project(z) -> residual block -> x of the next block

`B` batch, `W` channels of a resolution, `D` latent channels of a group.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.models.hierarchical.blocks import Style, convolution, residual_gain
from latentvae.models.hierarchical.encoder import Features, run, with_channels
from latentvae.models.hierarchical.gaussian import Gaussian, Posterior
from latentvae.models.hierarchical.layers import Layer

# A pick is a function that chooses the latents of a group, given its prior and its posterior.
Pick = Callable[[Gaussian, Gaussian | None], Tensor]


class Group(NamedTuple):
    """A block's prior, posterior and latents. The posterior is None without an image."""

    prior: Gaussian
    posterior: Gaussian | None
    z: Tensor

    @property
    def required_posterior(self) -> Gaussian:
        """The posterior, which must not be None: use this property only if there is an image."""
        assert self.posterior is not None
        return self.posterior


class Latents(NamedTuple):
    """Settings that all groups of latents share.

    These settings are the number of channels, the kind of posterior, and the function from the
    network's output to ln(std).
    """

    channels: int
    posterior: Posterior
    log_std: Callable[[Tensor], Tensor]


class TopDownBlock(nn.Module):
    """One block of the decoder, with a group of latents of D channels, (B, D, side, side)."""

    def __init__(
        self, width: int, *, resolution: int, latents: Latents, style: Style, gain: float
    ) -> None:
        super().__init__()
        self.latents = latents
        D, read = latents.channels, width * (2 if latents.posterior.sees_decoder else 1)
        self.posterior = style.head(read, width, 2 * D, resolution=resolution)
        self.prior = style.head(width, width, 2 * D + width, resolution=resolution, zero=True)
        self.project = convolution(D, width, 1, gain=gain)
        self.residual = style.decoder_block(width, resolution=resolution, gain=gain)

    def forward(self, x: Tensor, features: Tensor | None, pick: Pick) -> tuple[Tensor, Group]:
        """Return the block's maps, and its group of latents.

        Args:
            x: the decoder's maps of W channels, (B, W, side, side).
            features: the encoder's features, (B, W, side, side), or None without an image.
            pick: function that chooses the latents, given prior and posterior.
        """
        D = self.latents.channels
        mean, raw_std, shift = self.prior(x).split([D, D, x.shape[1]], dim=1)
        prior = Gaussian(mean.float(), self.latents.log_std(raw_std))
        posterior = None if features is None else self._posterior(x, features, prior)

        z = pick(prior, posterior)
        x = x + shift + self.project(z.to(x.dtype))
        return self.residual(x), Group(prior, posterior, z)

    def _posterior(self, x: Tensor, features: Tensor, prior: Gaussian) -> Gaussian:
        kind = self.latents.posterior
        read = torch.cat([x, features.to(x.dtype)], dim=1) if kind.sees_decoder else features
        mean, raw_std = self.posterior(read).chunk(2, dim=1)
        return kind.combine(Gaussian(mean.float(), self.latents.log_std(raw_std)), prior)


class Decoder(nn.Module):
    """All blocks, coarsest first, with nearest-neighbour upsampling between resolutions.

    The maps of each resolution up to `no_bias_above` start from a learned bias (channels, side,
    side).

    Args:
        layers: the blocks.
        widths: number of channels of each resolution.
        latents: settings that all groups of latents share.
        style: builds the residual blocks, see `blocks.Style`.
        no_bias_above: largest resolution that has a learned bias. Finer maps start from 0.
        mirrored: whether the decoder's blocks read the features of the encoder's blocks of the same
            resolution in reverse order. Otherwise all decoder blocks of a resolution read the
            features of the encoder's last block of this resolution.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        widths: Mapping[int, int],
        *,
        latents: Latents,
        style: Style,
        no_bias_above: int,
        mirrored: bool,
    ) -> None:
        super().__init__()
        self.layers, self.widths, self.mirrored = tuple(layers), dict(widths), mirrored
        self.latent_channels = latents.channels
        gain = residual_gain(len(layers))
        self.blocks = nn.ModuleList(
            [
                TopDownBlock(widths[side], resolution=side, latents=latents, style=style, gain=gain)
                for side in (layer.resolution for layer in layers)
            ]
        )

        sides = dict.fromkeys(layer.resolution for layer in layers)
        self.bias_of = nn.ParameterDict(
            {
                str(side): nn.Parameter(torch.zeros(1, widths[side], side, side))
                for side in sides
                if side <= no_bias_above
            }
        )
        self.gain = nn.Parameter(torch.ones(1, widths[layers[-1].resolution], 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, widths[layers[-1].resolution], 1, 1))
        self.gradient_checkpointing = False

    def forward(
        self, features: Features | None, batch: int, picks: Sequence[Pick]
    ) -> tuple[Tensor, list[Group]]:
        """Return the finest maps (B, W, side, side) of W channels, and all groups of latents.

        Args:
            features: the encoder's output, or None without an image. Features of fewer than B
                images are repeated.
            batch: number of samples B.
            picks: for each group, the function that chooses its latents.
        """
        maps: dict[int, Tensor] = {}
        groups: list[Group] = []
        for i, (layer, block, pick) in enumerate(zip(self.layers, self.blocks, picks, strict=True)):
            x = self._input(maps, layer, batch)
            x, group = run(self, block, x, self._features(features, i, batch), pick)
            maps[layer.resolution] = x
            groups.append(group)
        return maps[self.layers[-1].resolution] * self.gain + self.bias, groups

    def _input(self, maps: Mapping[int, Tensor], layer: Layer, batch: int) -> Tensor:
        side, width = layer.resolution, self.widths[layer.resolution]
        x = maps.get(side)
        if x is None:
            bias = self.bias_of[str(side)] if str(side) in self.bias_of else None
            x = self.gain.new_zeros(1, width, side, side) if bias is None else bias
            x = x.expand(batch, -1, -1, -1)
        if layer.source is not None:
            coarse = with_channels(maps[layer.source], width)
            x = x + F.interpolate(coarse, scale_factor=side // layer.source)
        return x

    def _features(self, features: Features | None, block: int, batch: int) -> Tensor | None:
        """Return the features that a block reads, repeated for each sample of an image."""
        if features is None:
            return None
        sides = [layer.resolution for layer in self.layers]
        own = features[sides[block]]
        place = sides[:block].count(sides[block]) if self.mirrored else 0
        chosen = own[-1 - place * len(own) // sides.count(sides[block])]
        copies = batch // chosen.shape[0]
        return chosen if copies == 1 else chosen.repeat(copies, 1, 1, 1)


def draw_posterior(prior: Gaussian, posterior: Gaussian | None) -> Tensor:
    """Draw latents from the posterior."""
    assert posterior is not None
    return posterior.draw()


def draw_from_posterior(generator: torch.Generator | None) -> Pick:
    """Return a function that draws latents from the posterior with a generator."""

    def pick(prior: Gaussian, posterior: Gaussian | None) -> Tensor:
        assert posterior is not None
        return posterior.draw(generator=generator)

    return pick


def posterior_mean(prior: Gaussian, posterior: Gaussian | None) -> Tensor:
    """Return the mean of the posterior."""
    assert posterior is not None
    return posterior.mean


def prior_mean(prior: Gaussian, posterior: Gaussian | None) -> Tensor:
    """Return the mean of the prior."""
    return prior.mean


def draw_prior(temperature: float, generator: torch.Generator | None) -> Pick:
    """Return a function that draws latents from the prior."""
    return lambda prior, _: prior.draw(temperature=temperature, generator=generator)


def given(z: Tensor) -> Pick:
    """Return a function that returns the given latents for any prior and posterior."""
    return lambda prior, _: z.to(prior.mean.dtype)
