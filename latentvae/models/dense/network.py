"""A variational autoencoder with one or more vectors of latents.

images -> encoder -> q(z_1|x), q(z_2|z_1) ... -> p(z_1|z_2) -> decoder -> p(x|z_1)

With one latent vector, the network is the VAE of Kingma and Welling (arXiv:1312.6114). With two
latent vectors, the network is the second network of the paper on IWAE (arXiv:1509.00519). The
posterior of a single latent vector may have a normalising flow (arXiv:1505.05770,
arXiv:1606.04934).

Symbols: `B` batch, `S` samples per image, `C` image channels, `H W` image size, `U` units of a
latent vector, `L` number of latent vectors. The vector z_1 is nearest to the image. In a `Bound`,
each latent vector is one group, and the groups are listed from z_L to z_1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from latentvae.likelihoods import pixel_distribution
from latentvae.models.bound import Bound, check_images
from latentvae.models.dense.gaussians import Gaussian
from latentvae.models.dense.posterior_flows import FlowName, build_flow
from latentvae.models.dense.trunks import (
    ConvDecoder,
    ConvEncoder,
    DenseDecoder,
    DenseEncoder,
    mlp,
)

MEAN_DRAWS = 16  # number of draws to estimate the mean of a latent that depends on another latent


class VectorVAE(ModelMixin, ConfigMixin):
    """A VAE whose latents are vectors.

        net = VectorVAE()
        bound = net(images, samples=50)
        nats = -bound.importance()            # (B,)
        pictures = net.sample(16)             # (16, C, H, W) in [-1, 1]

    Args:
        image_channels, image_height, image_width: shape of the images.
        latent_units: number of units of each latent vector, z_1 to z_L.
        hidden_channels: width of the dense layers between the image and z_1, between z_1 and z_2,
            and so on. There is one number for each latent vector.
        hidden_layers: number of dense layers between the image and z_1, and between each latent
            vector and the next. With residual blocks, the number is only for the layers between
            latent vectors.
        block_out_channels: channels of the residual blocks of convolutions between image and z_1.
            Each block halves height and width. Without blocks, all layers are dense.
        activation: "tanh", "elu" or "silu".
        likelihood: distribution of the pixels, see `likelihoods.PIXEL_DISTRIBUTIONS`.
        posterior_flow: flow after the Gaussian posterior of z_1: "none", "planar", "realnvp" or
            "iaf". A flow needs a network with a single latent vector.
        flow_layers, flow_channels: number and width of the flow's layers.
    """

    # Layers that the optimiser Muon does not train. A flow has masked layers, whose weights are not
    # whole matrices.
    outer_layers: tuple[str, ...] = (
        *("encoder.layers.0", "encoder.blocks.0.first", "encoder.blocks.0.skip"),
        *("decoder.last", "flow"),
    )

    @register_to_config
    def __init__(
        self,
        image_channels: int = 1,
        image_height: int = 28,
        image_width: int = 28,
        latent_units: Sequence[int] = (50,),
        hidden_channels: Sequence[int] = (200,),
        hidden_layers: int = 2,
        block_out_channels: Sequence[int] = (),
        activation: str = "tanh",
        likelihood: str = "bernoulli",
        posterior_flow: FlowName = "none",
        flow_layers: int = 2,
        flow_channels: int = 320,
    ) -> None:
        super().__init__()
        self.pixels = pixel_distribution(likelihood)
        self.image_shape = (image_channels, image_height, image_width)
        self.num_groups = len(latent_units)
        maps = (self.pixels.num_maps(image_channels), image_height, image_width)
        units, widths = list(latent_units), list(hidden_channels)

        # between x and z_1
        hidden = [widths[0]] * hidden_layers
        if block_out_channels:
            self.encoder: Any = ConvEncoder(
                self.image_shape, block_out_channels, widths[0], activation
            )
            self.decoder: Any = ConvDecoder(
                units[0], widths[0], block_out_channels, maps, activation
            )
        else:
            self.encoder = DenseEncoder(self.image_shape, hidden, activation)
            self.decoder = DenseDecoder(units[0], hidden, maps, activation)
        self.moments = nn.Linear(widths[0], 2 * units[0])
        self.flow = build_flow(
            posterior_flow,
            units=units[0],
            context=widths[0],
            layers=flow_layers,
            width=flow_channels,
        )

        # q(z_2|z_1) and p(z_1|z_2), and so on
        self.up = nn.ModuleList(
            _conditional(units[i], widths[i + 1], units[i + 1], hidden_layers, activation)
            for i in range(len(units) - 1)
        )
        self.down = nn.ModuleList(
            _conditional(units[i + 1], widths[i + 1], units[i], hidden_layers, activation)
            for i in range(len(units) - 1)
        )

    # bounds

    def forward(self, images: Tensor, *, samples: int = 1, detach_posterior: bool = False) -> Bound:
        """Draw latents and return the parts of the variational bound. See `models.bound`."""
        # posterior of z_1
        check_images(images, self.image_shape)
        features = self.encoder(images)
        first = Gaussian.from_moments(self.moments(features))
        drawn = [first.sample(count=samples)]  # (S, B, U)
        scored = first.detach() if detach_posterior else first
        log_q = [scored.log_prob(drawn[0])]
        if self.flow is not None:
            drawn[0], log_det = self.flow(drawn[0], features)
            log_q[0] = log_q[0] - log_det

        # posteriors of z_2 .. z_L, each given the latent before it
        posteriors = [first]
        for layer in self.up:
            posterior = Gaussian.from_moments(layer(drawn[-1]))
            drawn.append(posterior.sample())
            scored = posterior.detach() if detach_posterior else posterior
            log_q.append(scored.log_prob(drawn[-1]))
            posteriors.append(posterior)

        # priors of z_L .. z_1
        priors = [Gaussian.standard(drawn[-1])]
        for layer, z in zip(reversed(self.down), reversed(drawn[1:]), strict=True):
            priors.append(Gaussian.from_moments(layer(z)))
        ratios = [
            q - prior.log_prob(z)
            for q, prior, z in zip(reversed(log_q), priors, reversed(drawn), strict=True)
        ]

        # The KL of z_L has a closed form, because the prior of z_L is fixed.
        kl, unit_kl = list(ratios), None
        if self.flow is None:
            units = posteriors[-1].kl(priors[0])
            kl[0] = units.sum(-1).expand_as(ratios[0])
            unit_kl = units.mean(0)
        return Bound(
            log_likelihood=self._log_likelihood(images, drawn[0]),
            kl=torch.stack(kl),
            log_ratio=torch.stack(ratios),
            unit_kl=unit_kl,
            latents=tuple(drawn),
            posterior=(first.mean, first.logvar) if self._is_single_gaussian else None,
        )

    def _log_likelihood(self, images: Tensor, z: Tensor) -> Tensor:
        """Return ln p(x | z) of B images x, for S samples of z for each image, (S, B)."""
        parameters = self.decoder(z.flatten(0, 1))
        return self.pixels.log_prob(images, parameters).unflatten(0, z.shape[:2])

    # uses other than the bound

    def posterior(self, images: Tensor) -> Gaussian:
        """Return the Gaussian posterior q(z_1 | x) of U units before the flow, (B, U)."""
        return Gaussian.from_moments(self.moments(self.encoder(images)))

    @property
    def group_sizes(self) -> list[int]:
        """Number of latent values in each group. A group is one of the latent vectors."""
        return list(self.config["latent_units"])[::-1]

    @property
    def _is_single_gaussian(self) -> bool:
        return self.flow is None and self.num_groups == 1

    def posterior_moments(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return mean and log-variance of the U units, (B, U), if the posterior is one Gaussian.

        Return None if the network has a flow or more than one latent vector.
        """
        if not self._is_single_gaussian:
            return None
        posterior = self.posterior(images)
        return posterior.mean, posterior.logvar

    def encode(self, images: Tensor) -> Tensor:
        """Return the posterior mean of z_1, (B, U) for U units.

        If the network has a flow, the flow is applied to the mean.
        """
        features = self.encoder(images)
        z = Gaussian.from_moments(self.moments(features)).mean
        return z if self.flow is None else self.flow(z, features)[0]

    def encode_vector(
        self, images: Tensor, *, draw: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return z_1 of the images, (B, U) for U units. See `models.bound.LikelihoodNet`."""
        if not draw:
            return self.encode(images)
        features = self.encoder(images)
        posterior = Gaussian.from_moments(self.moments(features))
        noise = torch.randn(posterior.mean.shape, generator=generator, device=self.device)
        z = posterior.mean + (0.5 * posterior.logvar).exp() * noise
        return z if self.flow is None else self.flow(z, features)[0]

    def decode_vector(self, vector: Tensor) -> Tensor:
        """Decode latents z_1 of U units, (B, U), to pixel means (B, C, H, W) in [-1, 1]."""
        return self.decode(vector)

    def decode(self, z: Tensor) -> Tensor:
        """Decode N latents z_1 of U units, (N, U), to pixel means (N, C, H, W) in [-1, 1]."""
        return self.pixels.mean(self.decoder(z))

    def posterior_means(self, images: Tensor) -> Tensor:
        """Return the posterior means of all latent vectors, z_1 to z_L, joined.

        The result is (B, n), where n is the number of units of all latent vectors together. The
        means of z_2 to z_L are estimated from 16 random draws. If the network has a flow, the
        result is that of `encode`.
        """
        features = self.encoder(images)
        first = Gaussian.from_moments(self.moments(features))
        if not self.up:
            return self.encode(images)

        # The posterior mean of each of z_2 .. z_L is estimated by a mean over draws of the vector
        # before it.
        means, z = [first.mean], first.sample(count=MEAN_DRAWS)
        for layer in self.up:
            posterior = Gaussian.from_moments(layer(z))
            means.append(posterior.mean.mean(0))
            z = posterior.sample()
        return torch.cat(means, dim=-1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode images, and decode the posterior's mean to pixel means (B, C, H, W)."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def sample(
        self,
        num: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        mean: bool = True,
    ) -> Tensor:
        """Draw images from the prior. See `models.bound.LikelihoodNet`."""

        def noise(units: int) -> Tensor:
            return temperature * torch.randn(num, units, generator=generator, device=self.device)

        units = self.config["latent_units"]
        z = noise(units[-1])
        for layer, size in zip(reversed(self.down), reversed(units[:-1]), strict=True):
            prior = Gaussian.from_moments(layer(z))
            z = prior.mean + (0.5 * prior.logvar).exp() * noise(size)
        parameters = self.decoder(z)
        if mean:
            return self.pixels.mean(parameters)
        return self.pixels.sample(parameters, generator=generator)

    def start_at(self, mean_image: Tensor) -> None:
        """Set the last layer's biases so that the output is `mean_image` (C, H, W), if possible.

        If the likelihood offers no such biases, nothing changes.
        """
        if (bias := self.pixels.start_bias(mean_image)) is not None:
            self.decoder.start_at(bias)


def _conditional(
    inputs: int, hidden: int, outputs: int, layers: int, activation: str
) -> nn.Sequential:
    """Return a dense network from a latent vector to mean and log-variance of its neighbour."""
    return nn.Sequential(
        *mlp([inputs, *[hidden] * layers], activation), nn.Linear(hidden, 2 * outputs)
    )
