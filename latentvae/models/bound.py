"""Variational bounds of ln p(x), and the interface of networks that compute these bounds.

A network draws latents z = (z_1 .. z_G) of G groups from its posterior q(z | x) and returns the
parts of the bounds (`Bound`). The bounds of Kingma and Welling (ELBO, arXiv:1312.6114) and of Burda
et al. (IWAE, arXiv:1509.00519) follow from these parts.

Symbols: `B` batch size, `C` image channels, `H W` image size, `S` posterior samples per image, `G`
groups of latents, `U` latent units.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from latentvae.errors import UserError
from latentvae.likelihoods import PixelDistribution


@dataclass
class Bound(BaseOutput):
    """The parts of a variational bound, in nats per image, float32.

    The network draws S latents for each of B images. A latent consists of G groups, which have U
    units together.

    Attributes:
        log_likelihood: ln p(x | z), (S, B).
        kl: KL divergence from posterior to prior of each group, given the drawn latents of the
            groups on which posterior and prior depend, (G, S, B). `kl` is exact where a closed form
            exists. Otherwise `kl` equals `log_ratio`.
        log_ratio: ln q(z_g | ...) - ln p(z_g | ...) at the drawn latents, (G, S, B). The dots stand
            for what z_g depends on: other groups and, in q, the image.
        unit_kl: KL divergence of each latent unit, averaged over samples, (B, U). None if a
            hierarchical VAE has more than 2 ** 14 units, or if the posterior has a flow. If
            `VectorVAE` has several latent vectors, `unit_kl` has only the units of the last vector
            z_L. `unit_kl` of a `ClassVAE` has only the units of the vector z, not the class.
        latents: the drawn latents of each group, (S, B, units of the group), or None if the network
            does not return them. `VectorVAE` lists z_1 first, which is the last group.
        posterior: mean and log-variance (B, U) if the posterior is a single Gaussian, or None.
    """

    log_likelihood: Tensor = None  # type: ignore[assignment]
    kl: Tensor = None  # type: ignore[assignment]
    log_ratio: Tensor = None  # type: ignore[assignment]
    unit_kl: Tensor | None = None
    latents: tuple[Tensor, ...] | None = None
    posterior: tuple[Tensor, Tensor] | None = None

    def elbo(self) -> Tensor:
        """Return the evidence lower bound of each of B images in nats, averaged over samples."""
        return (self.log_likelihood - self.kl.sum(0)).mean(0)

    def log_weights(self) -> Tensor:
        """Return ln w = ln p(x, z) - ln q(z | x) of S samples z per image in nats, (S, B)."""
        return self.log_likelihood - self.log_ratio.sum(0)

    def importance(self) -> Tensor:
        """Return the importance-weighted bound of each of B images in nats, from all samples."""
        weights = self.log_weights()
        return torch.logsumexp(weights, dim=0) - math.log(weights.shape[0])


class LikelihoodNet(Protocol):
    """Interface of a network with a variational bound.

    The network is also a `ModelMixin` of diffusers.

    Attributes:
        pixels: the distribution of pixels, given the decoder's output.
        image_shape: shape (C, H, W) of an image.
        num_groups: number of groups of latents G.
        group_sizes: number of latent values in each group.
        outer_layers: names of the layers that the optimiser Muon does not train, such as the first
            and the last layers.
    """

    pixels: PixelDistribution
    image_shape: tuple[int, int, int]
    num_groups: int
    outer_layers: tuple[str, ...]

    @property
    def group_sizes(self) -> list[int]: ...
    def state_dict(self) -> dict[str, Tensor]: ...

    def __call__(
        self, images: Tensor, *, samples: int = 1, detach_posterior: bool = False
    ) -> Bound:
        """Draw latents and return the parts of the bound.

        Args:
            images: pixels in [-1, 1], (B, C, H, W).
            samples: number of posterior samples per image S.
            detach_posterior: compute `log_ratio` with constant parameters of q, so that the
                gradient of `log_ratio` reaches the encoder only through the latents
                (arXiv:1810.04152).
        """
        ...

    def posterior_means(self, images: Tensor) -> Tensor | None:
        """Return the posterior mean of each of U latent units given the image, (B, U).

        If the posterior mean is unknown, return None. Without posterior means, the active units
        (units that depend on the image) are counted by the KL of each unit.
        """
        ...

    def posterior_moments(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return mean and log-variance of the U units, (B, U), if the posterior is one Gaussian.

        Return None for any other posterior.
        """
        ...

    def encode_vector(
        self, images: Tensor, *, draw: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return all latents that the decoder needs, as one vector of d values per image, (B, d).

        Args:
            images: pixels in [-1, 1], (B, C, H, W).
            draw: draw from the posterior instead of taking its mean.
            generator: random generator that draws the latents.
        """
        ...

    def decode_vector(self, vector: Tensor) -> Tensor:
        """Decode vectors (B, d) from `encode_vector` to pixel means (B, C, H, W) in [-1, 1]."""
        ...

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode images, and decode the posterior's mean to pixel means (B, C, H, W)."""
        ...

    def sample(
        self,
        num: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        mean: bool = True,
    ) -> Tensor:
        """Draw latents from the prior and return images (num, C, H, W) in [-1, 1].

        Args:
            num: number of images.
            temperature: factor on the prior's standard deviations.
            generator: random generator on the network's device.
            mean: return the mean of the pixels' distribution instead of drawn pixels.
        """
        ...

    def start_at(self, mean_image: Tensor) -> None:
        """Set the last biases of a new decoder so that its output is `mean_image`, if possible.

        For some distributions of the pixels, this is not possible. The biases then do not change.

        Args:
            mean_image: mean of the training images, (C, H, W).
        """
        ...


def check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise UserError unless the images are (B, C, H, W) with the given (C, H, W)."""
    if tuple(images.shape[1:]) != shape:
        raise UserError(
            f"images must have shape (B, C, H, W) with (C, H, W) = {shape} (got "
            f"{tuple(images.shape)})."
        )
