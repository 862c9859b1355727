"""The same two calls for every diffusers autoencoder of images, whatever its outputs are named.

    z = encode(net, images)                       # images (B, C, H, W) -> z (B, d, h, w)
    mean, logvar = encode_posterior(net, images)  # logvar is None where there is no posterior
    recon = decode(net, z)                        # (B, C, f * h, f * w), not clamped

diffusers' classes give `latent_dist`, `latents` or `latent`; a few take pixels in [0, 1] instead of
[-1, 1]. Here images are always in [-1, 1]. For a tokenizer `z` is what its encoder gives, before it
is quantised; `tokenize` gives the indices. The network's family answers (`models.table`).

`B` batch, `C` image channels, `H W` pixels, `d` latent channels, `h w` latent positions.
"""

import torch
from torch import Tensor

from latentvae.models.family import Codes, LatentShape
from latentvae.models.network import Computation, Network
from latentvae.models.table import family_of


def encode(
    net: Network,
    images: Tensor,
    *,
    sample: bool = False,
    generator: torch.Generator | None = None,
    computation: Computation | None = None,
) -> Tensor:
    """Latents of images in [-1, 1]: the posterior's mode or, with `sample`, a draw from it.

    Args:
        computation: what computes in place of the network's own methods; None is these.
    """
    family = family_of(net)
    return family.encode(net, images, sample=sample, generator=generator, computation=computation)


def decode(net: Network, z: Tensor, *, computation: Computation | None = None) -> Tensor:
    """Images of latents, about [-1, 1]: as the network gives them, not clamped."""
    return family_of(net).decode(net, z, computation=computation)


def encode_posterior(
    net: Network, images: Tensor, *, computation: Computation | None = None
) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance of the posterior of images in [-1, 1]; without one, latent and None."""
    return family_of(net).posterior(net, images, computation=computation)


def image_channels(net: Network) -> int:
    """C of the images that it takes."""
    return family_of(net).image_channels(net)


def codes(net: Network) -> Codes | None:
    """What a tokenizer has of codes; None if `net` is none."""
    return family_of(net).codes(net)


def num_codes(net: Network) -> int | None:
    """K of a tokenizer (of each level); None if `net` is none."""
    found = codes(net)
    return None if found is None else found.number


def num_levels(net: Network) -> int:
    """Codes for each position; more than 1 of a residual quantiser."""
    found = codes(net)
    return 1 if found is None else found.levels


def tokenize(net: Network, z: Tensor) -> Tensor:
    """Indices (B, h, w), of L levels (B, L, h, w), of the codes nearest to a tokenizer's latents,
    in 0..K - 1.

    Raises:
        UserError: not a tokenizer.
    """
    return family_of(net).tokenize(net, z)


def decode_indices(
    net: Network, indices: Tensor, *, computation: Computation | None = None
) -> Tensor:
    """Images of indices, as the network gives them, in about [-1, 1].

    Raises:
        UserError: not a tokenizer.
    """
    return family_of(net).decode_indices(net, indices, computation=computation)


def measure_shape(net: Network) -> LatentShape:
    """f and d: from the config of a known class, else by encoding and decoding a grey image.

    Raises:
        UserError: the network does not take images.
    """
    return family_of(net).latent_shape(net)
