"""Encode, decode and tokenize with any image autoencoder of diffusers by the same functions.

    z = encode(net, images)                       # images (B, C, H, W) -> z (B, d, h, w)
    mean, logvar = encode_posterior(net, images)  # logvar is None without a posterior
    recon = decode(net, z)                        # (B, C, f * h, f * w), not clamped

diffusers' classes differ: their outputs have `latent_dist`, `latents` or `latent`, and a few
classes take pixels in [0, 1]. In this module, images are always in [-1, 1]. For a tokenizer, `z` is
the encoder's output before quantisation, and `tokenize` returns the indices of the codes.
`models.table` finds the `Family` object of a network, which has the methods for this kind of
network. Each function of this module calls a method of the `Family` object.

`B` batch, `C` image channels, `H W` pixels, `d` latent channels, `h w` latent positions, `f`
downsampling factor.
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
    """Return the latents (B, d, h, w) of images in [-1, 1].

    Args:
        images: (B, C, H, W).
        sample: draw from the posterior. By default the posterior's mode is returned.
        generator: random generator for the draw from the posterior.
        computation: object that replaces the network's own `encode` and `decode`, for example to
            compute an image strip by strip.
    """
    family = family_of(net)
    return family.encode(net, images, sample=sample, generator=generator, computation=computation)


def decode(net: Network, z: Tensor, *, computation: Computation | None = None) -> Tensor:
    """Decode latents (B, d, h, w) to images, about in [-1, 1] and not clamped.

    The images are (B, C, f h, f w) for the downsampling factor f.
    """
    return family_of(net).decode(net, z, computation=computation)


def encode_posterior(
    net: Network, images: Tensor, *, computation: Computation | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return mean and log-variance (B, d, h, w) of the posterior of images in [-1, 1].

    For a network without a posterior, return the latents and None.
    """
    return family_of(net).posterior(net, images, computation=computation)


def image_channels(net: Network) -> int:
    """Return C, the number of channels of the images that the network takes."""
    return family_of(net).image_channels(net)


def codes(net: Network) -> Codes | None:
    """Return the description of a tokenizer's codes, or None for other networks."""
    return family_of(net).codes(net)


def num_codes(net: Network) -> int | None:
    """Return the number of codes in each codebook of a tokenizer, or None for other networks."""
    found = codes(net)
    return None if found is None else found.number


def num_levels(net: Network) -> int:
    """Return the number of codes per latent position.

    The number is above 1 for a residual quantiser, and for a network with several maps of codes. It
    is 1 for a network without codes.
    """
    found = codes(net)
    return 1 if found is None else found.levels


def tokenize(net: Network, z: Tensor) -> Tensor:
    """Quantise the latents of a tokenizer, and return the indices of their codes.

    Returns:
        Indices (B, h, w), or (B, L, h, w) with L codes per position. With K codes, the values are
        in 0..K - 1.

    Raises:
        UserError: the network is not a tokenizer.
    """
    return family_of(net).tokenize(net, z)


def decode_indices(
    net: Network, indices: Tensor, *, computation: Computation | None = None
) -> Tensor:
    """Decode code indices to images, about in [-1, 1] and not clamped.

    The images are (B, C, f h, f w) for the downsampling factor f.

    Args:
        indices: (B, h, w), or (B, L, h, w) with L codes per position. With K codes, the values are
            in 0..K - 1.
        computation: object that replaces the network's own `encode` and `decode`.

    Raises:
        UserError: the network is not a tokenizer.
    """
    return family_of(net).decode_indices(net, indices, computation=computation)


def measure_shape(net: Network) -> LatentShape:
    """Return the shape of the latents, such as the downsampling factor f and the channels d.

    For many classes of networks, such as `AutoencoderKL`, the config gives f and d. For other
    classes, this function encodes a test image and measures the latents.

    Raises:
        UserError: the network does not encode and decode images, or is a VAE for images that are
            not square.
    """
    return family_of(net).latent_shape(net)
