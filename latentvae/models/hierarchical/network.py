"""Hierarchical VAE: one top-down network with groups of latents at every resolution.

With matching options, the network is Ladder VAE (arXiv:1602.02282), NVAE (arXiv:2007.03898), Very
Deep VAE (arXiv:2011.10650) or Efficient-VDVAE (arXiv:2203.13751).

    images (B, C, H, W) -> encoder -> features of each resolution
    bias -> block 1 -> ... -> block G -> conv_out -> parameters of the pixels' distribution
              |                  |
             z_1                z_G      each from q(z_g | z_<g, x), or from the prior p(z_g | z_<g)

`B` batch, `C` image channels, `H W` image size, `G` groups, `D` latent channels of a group.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from latentvae.errors import UserError
from latentvae.likelihoods import PixelDistribution, pixel_distribution
from latentvae.likelihoods.mixture import DiscretizedLogisticMixture
from latentvae.models.bound import Bound, check_images
from latentvae.models.hierarchical import layers as strings
from latentvae.models.hierarchical.blocks import convolution
from latentvae.models.hierarchical.encoder import Encoder, Features
from latentvae.models.hierarchical.gaussian import LOG_STD, POSTERIORS
from latentvae.models.hierarchical.styles import build_style
from latentvae.models.hierarchical.top_down import (
    Decoder,
    Group,
    Latents,
    Pick,
    draw_from_posterior,
    draw_posterior,
    draw_prior,
    given,
    posterior_mean,
    prior_mean,
)

# Networks with more latent units than this do not return the KL divergence of each unit.
MAX_UNITS = 2**14


class HierarchicalVAE(ModelMixin, ConfigMixin):
    """A hierarchical VAE with diffusers' file format and the methods of `LikelihoodNet`.

        net = HierarchicalVAE.from_pretrained(folder)
        bound = net(images)  # parts of the evidence lower bound
        images = net.sample(16, temperature=0.8)
        latents = net.encode(images)  # one tensor (B, D, side, side) for each group
        recon = net.decode(latents)

    Each block of the decoder has one group of latents. A resolution is the side of feature maps.

    Args:
        image_channels: number of image channels C.
        sample_size: side of the images in pixels.
        levels: number of possible values of a pixel, or None for the default of the likelihood.
        enc_blocks: blocks of the encoder, such as "32x11,32d2,16x6", see `layers`. If the first
            resolution is coarser than the images, squares of pixels are folded into channels. If
            the first resolution is a little larger than the images, black pixels are added at the
            edges.
        dec_blocks: blocks of the decoder, such as "1x1,4m1,4x2". The last resolution may be coarser
            or a little larger than the images, like the encoder's first resolution.
        width: number of channels of the feature maps.
        custom_widths: other numbers of channels for some resolutions, such as "32:64,16:128" for 64
            channels at resolution 32 and 128 at resolution 16.
        zdim: number of latent channels D of a group.
        bottleneck_multiple: channels inside a block, divided by the width.
        likelihood: distribution of the pixels, a key of `PIXEL_DISTRIBUTIONS`.
        num_mixtures: number of components of the likelihood logistic_mixture.
        block: style of the blocks, "vdvae" or "nvae".
        activation: activation of the style "vdvae", "gelu" or "silu".
        posterior: how the posterior follows from the network's output and the prior. With "full",
            the output is the posterior. With "residual", the output is the difference from the
            prior (NVAE). With "precision", the posterior is the mean of output and prior, weighted
            by precision (Ladder VAE).
        std: how a standard deviation follows from the network's output, "exp" or "softplus".
        links: which features of the encoder a decoder's block reads. With "last", the block reads
            the features of the encoder's last block at the same resolution. With "mirrored", the
            decoder's blocks of a resolution read the features of the encoder's blocks of this
            resolution in reverse order.
        no_bias_above: largest resolution whose maps start from a learned bias.

    Raises:
        UserError: the blocks do not fit each other or the images.
    """

    _supports_gradient_checkpointing = True
    outer_layers: tuple[str, ...] = ("encoder.conv_in", "conv_out")

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        sample_size: int = 32,
        levels: int | None = None,
        enc_blocks: str = "32x2,32d2,16x2,16d2,8x2,8d2,4x2,4d4,1x1",
        dec_blocks: str = "1x1,4m1,4x1,8m4,8x2,16m8,16x2,32m16",
        width: int = 64,
        custom_widths: str = "",
        zdim: int = 16,
        bottleneck_multiple: float = 0.25,
        likelihood: str = "logistic_mixture",
        num_mixtures: int = 10,
        block: str = "vdvae",
        activation: str = "gelu",
        posterior: str = "full",
        std: str = "exp",
        links: str = "last",
        no_bias_above: int = 64,
    ) -> None:
        super().__init__()

        # blocks and their sizes
        self.image_shape = (image_channels, sample_size, sample_size)
        encoder = strings.encoder_layers(enc_blocks)
        decoder = strings.decoder_layers(dec_blocks)
        self.num_groups = len(decoder)
        first, last = encoder[0].resolution, decoder[-1].resolution
        side = strings.fit(sample_size, encoder=first, decoder=last)
        self.padding, self.read, self.written = (
            (side - sample_size) // 2,
            side // first,
            side // last,
        )
        made = strings.check_blocks(enc_blocks, dec_blocks, custom_widths)
        widths = strings.resolution_widths(custom_widths, width, made)
        style = build_style(block, bottleneck_multiple=bottleneck_multiple, activation=activation)
        self._has_batch_norm = style.has_batch_norm

        # networks
        self.pixels = _pixels(likelihood, levels, num_mixtures)
        maps = self.pixels.num_maps(image_channels)
        self.encoder = Encoder(
            image_channels * self.read**2, encoder, widths, style, keep_all=links == "mirrored"
        )
        self.decoder = Decoder(
            decoder,
            widths,
            latents=Latents(zdim, POSTERIORS[posterior], LOG_STD[std]),
            style=style,
            no_bias_above=no_bias_above,
            mirrored=links == "mirrored",
        )
        self.conv_out = convolution(widths[last], maps * self.written**2, 1)

    @property
    def group_sizes(self) -> list[int]:
        """Number of latent values in each group. Each block of the decoder has one group."""
        return [math.prod(shape) for shape in self.latent_shapes]

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """Shape (channels, side, side) of the latents of each group."""
        D = self.config["zdim"]
        return [(D, layer.resolution, layer.resolution) for layer in self.decoder.layers]

    def group_names(self) -> list[str]:
        """Return the name of each group: its size, and its number among groups of this size.

        An example is "4x4.0".
        """
        sides = [layer.resolution for layer in self.decoder.layers]
        return [f"{side}x{side}.{sides[:i].count(side)}" for i, side in enumerate(sides)]

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Save memory: compute blocks again in the backward pass. See `ModelMixin`.

        Raises:
            UserError: the blocks have batch norm, whose statistics would be updated twice.
        """
        if self._has_batch_norm:
            raise UserError(
                "gradient_checkpointing needs blocks without batch norm (got block nvae). Use "
                "block vdvae, or switch gradient_checkpointing off."
            )
        super().enable_gradient_checkpointing(*args, **kwargs)

    def forward(self, images: Tensor, *, samples: int = 1, detach_posterior: bool = False) -> Bound:
        """Draw latents and return the parts of the variational bound, see `LikelihoodNet`."""
        features = self._features(images)
        batch = samples * images.shape[0]

        # latents, with their priors and posteriors
        maps, groups = self.decoder(features, batch, [draw_posterior] * self.num_groups)
        log_p = [group.prior.log_prob(group.z) for group in groups]
        judges = self._constant_posteriors(features, groups) if detach_posterior else groups
        pairs = zip(judges, groups, strict=True)
        log_q = [judge.required_posterior.log_prob(group.z) for judge, group in pairs]
        kl = [group.required_posterior.kl_to(group.prior) for group in groups]

        # pixels
        log_likelihood = self.pixels.log_prob(images, self._pixel_parameters(maps))

        def per_sample(values: list[Tensor]) -> Tensor:
            return torch.stack([x.flatten(1).sum(1).view(samples, -1) for x in values])

        return Bound(
            log_likelihood=log_likelihood.view(samples, -1),
            kl=per_sample(kl),
            log_ratio=per_sample([q - p for q, p in zip(log_q, log_p, strict=True)]),
            unit_kl=self._unit_kl(kl, samples),
        )

    def posterior_moments(self, images: Tensor) -> None:
        """Return None, because the posterior is not a single Gaussian vector."""

    def posterior_means(self, images: Tensor) -> None:
        """Return None, because a latent's mean depends on the image and on earlier latents."""

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode images, and decode the posteriors' means to images (B, C, H, W) in [-1, 1]."""
        return self.partial(images, self.num_groups)

    @torch.no_grad()
    def partial(self, images: Tensor, groups: int) -> Tensor:
        """Reconstruct images (B, C, H, W) in [-1, 1] from the latents of the first groups only.

        Args:
            images: images (B, C, H, W) in [-1, 1].
            groups: number of groups whose latents are the means of their posteriors. Later groups
                take the means of their priors.

        Raises:
            UserError: `groups` is negative, or larger than the number of groups.
        """
        if not 0 <= groups <= self.num_groups:
            raise UserError(f"groups must be 0 to {self.num_groups} (got {groups}).")
        picks = [posterior_mean] * groups + [prior_mean] * (self.num_groups - groups)
        return self.pixels.mean(self._pixel_parameters(self._with_images(images, picks)[0]))

    @torch.no_grad()
    def encode_vector(
        self, images: Tensor, *, draw: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the latents of all groups, flattened and joined to d values per image, (B, d).

        See `LikelihoodNet`.
        """
        picks = [draw_from_posterior(generator) if draw else posterior_mean] * self.num_groups
        groups = self._with_images(images, picks)[1]
        return torch.cat([group.z.flatten(1) for group in groups], dim=1)

    @torch.no_grad()
    def decode_vector(self, vector: Tensor) -> Tensor:
        """Decode vectors (B, d) from `encode_vector` to pixel means (B, C, H, W) in [-1, 1]."""
        parts = vector.split(self.group_sizes, dim=1)
        shaped = zip(parts, self.latent_shapes, strict=True)
        return self.decode([part.unflatten(1, shape) for part, shape in shaped])

    @torch.no_grad()
    def encode(self, images: Tensor, *, draw: bool = False) -> list[Tensor]:
        """Return the latents of each group, with D channels (B, D, side, side), coarsest first.

        Args:
            images: images (B, C, H, W) in [-1, 1].
            draw: draw from the posteriors instead of taking their means.
        """
        pick = draw_posterior if draw else posterior_mean
        return [group.z for group in self._with_images(images, [pick] * self.num_groups)[1]]

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Decode latents of the first groups to pixel means (B, C, H, W) in [-1, 1].

        Args:
            latents: for each of the first groups, coarsest first, one tensor (B, D, side, side)
                with D channels. Later groups take the means of their priors.

        Raises:
            UserError: there are no latents, too many, or a tensor has a wrong shape.
        """
        return self.pixels.mean(self.decode_parameters(latents))

    def decode_parameters(self, latents: Sequence[Tensor]) -> Tensor:
        """Decode latents to M maps of parameters of the pixels' distribution, (B, M, H, W).

        `decode` describes the argument `latents`.
        """
        shapes = [tuple(z.shape[1:]) for z in latents]
        if not 1 <= len(latents) <= self.num_groups or shapes != self.latent_shapes[: len(shapes)]:
            raise UserError(
                f"latents must be 1 to {self.num_groups} tensors of shapes (B, D, side, side) = "
                f"{self.latent_shapes} (got {shapes})."
            )
        picks = [given(z) for z in latents] + [prior_mean] * (self.num_groups - len(latents))
        return self._pixel_parameters(self.decoder(None, latents[0].shape[0], picks)[0])

    @torch.no_grad()
    def sample(
        self,
        num: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        mean: bool = True,
    ) -> Tensor:
        """Draw latents from the prior and return images (num, C, H, W) in [-1, 1].

        See `LikelihoodNet`. Temperature 0 gives the mode of every prior.
        """
        picks = [draw_prior(temperature, generator)] * self.num_groups
        parameters = self._pixel_parameters(self.decoder(None, num, picks)[0])
        if mean:
            return self.pixels.mean(parameters)
        return self.pixels.sample(parameters, generator=generator)

    @torch.no_grad()
    def start_at(self, mean_image: Tensor) -> None:
        """Set the last layer's biases so that the output is `mean_image` (C, H, W), if possible.

        Each bias of the last layer is the same at all positions. So the output can only be the mean
        of `mean_image` over positions. If the likelihood offers no such biases, nothing changes.
        """
        padded = F.pad(mean_image, [self.padding] * 4, value=-1.0)
        if (bias := self.pixels.start_bias(padded)) is not None:
            own: Any = self.conv_out.bias
            own.copy_(F.pixel_unshuffle(bias, self.written).mean((1, 2)))

    def _features(self, images: Tensor) -> Features:
        check_images(images, self.image_shape)
        padded = F.pad(images.to(self.dtype), [self.padding] * 4, value=-1.0)
        return self.encoder(F.pixel_unshuffle(padded, self.read))

    def _with_images(self, images: Tensor, picks: Sequence[Pick]) -> tuple[Tensor, list[Group]]:
        return self.decoder(self._features(images), images.shape[0], picks)

    def _pixel_parameters(self, maps: Tensor) -> Tensor:
        """Return M maps of parameters of the pixels' distribution from the decoder's last maps."""
        parameters = F.pixel_shuffle(self.conv_out(maps), self.written)
        return F.pad(parameters, [-self.padding] * 4)

    def _constant_posteriors(self, features: Features, groups: Sequence[Group]) -> list[Group]:
        """Return the groups, computed again so that gradients flow only through the latents.

        The posterior of a group depends on the latents of earlier groups, through the decoder. So
        the decoder computes all groups again, with constant weights and features.
        """
        constant = {side: [x.detach() for x in own] for side, own in features.items()}
        weights = {name: p.detach() for name, p in self.decoder.named_parameters()}
        buffers = {name: b.clone() for name, b in self.decoder.named_buffers()}
        picks = [given(group.z) for group in groups]
        arguments = (constant, groups[0].z.shape[0], picks)
        return functional_call(self.decoder, (weights, buffers), arguments)[1]

    def _unit_kl(self, kl: Sequence[Tensor], samples: int) -> Tensor | None:
        if sum(self.group_sizes) > MAX_UNITS:
            return None
        flat = torch.cat([x.flatten(1) for x in kl], dim=1)
        return rearrange(flat, "(s b) u -> s b u", s=samples).mean(0)


def _pixels(likelihood: str, levels: int | None, num_mixtures: int) -> PixelDistribution:
    if likelihood == "logistic_mixture":
        return DiscretizedLogisticMixture(levels or 256, num_mixtures)
    return pixel_distribution(likelihood, levels=levels)
