"""The same two calls for every diffusers autoencoder of images, whatever its outputs are named.

    z = encode(net, images)                       # images (B, C, H, W) -> z (B, d, h, w)
    mean, logvar = encode_posterior(net, images)  # logvar is None where there is no posterior
    recon = decode(net, z)                        # (B, C, f * h, f * w), not clamped

diffusers' classes give `latent_dist`, `latents` or `latent`; a few take pixels in [0, 1] instead of
[-1, 1]. Here images are always in [-1, 1]. For a tokenizer `z` is what its encoder gives, before it
is quantised; `tokenize` gives the indices.

`B` batch, `C` image channels, `H W` pixels, `d` latent channels, `h w` latent positions.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latentvae.errors import UserError
from latentvae.models.conv.kl import downsampling_factor
from latentvae.models.conv.vq import DiscreteAutoencoder

PROBE = 192  # pixels a side of the image that `measure_shape` tries; no fixed size is this


class Computation(Protocol):
    """What computes a network's calls by other means, such as `compute.strips`."""

    def encode(self, net: Any, images: Tensor) -> Any:
        """Return what `net.encode(images)` returns."""
        ...

    def decode(self, net: Any, z: Tensor, *, force_not_quantize: bool = False) -> Any:
        """Return what `net.decode(z)` returns; of codes with `force_not_quantize`."""
        ...


def encode(
    net: Any,
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
    output = _encode(net, images, computation)
    posterior = read_posterior(output)
    if posterior is not None and sample:
        return posterior.sample(generator)
    return _mean_of(output)  # a Gaussian's mode is its mean


def decode(net: Any, z: Tensor, *, computation: Computation | None = None) -> Tensor:
    """Images of latents, about [-1, 1]: as the network gives them, not clamped."""
    output = net.decode(z) if computation is None else computation.decode(net, z)
    images: Tensor = output.sample
    return images * 2 - 1 if takes_unit_range(net) else images


def encode_posterior(
    net: Any, images: Tensor, *, computation: Computation | None = None
) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance of the posterior of images in [-1, 1]; without one, latent and None."""
    output = _encode(net, images, computation)
    posterior = read_posterior(output)
    return _mean_of(output), None if posterior is None else posterior.logvar


def _encode(net: Any, images: Tensor, computation: Computation | None) -> Any:
    images = _to_range_of(net, images)
    return net.encode(images) if computation is None else computation.encode(net, images)


def _mean_of(output: Any) -> Tensor:
    posterior = read_posterior(output)
    if posterior is not None:
        return posterior.mean
    return output.latents if hasattr(output, "latents") else output.latent


def read_posterior(output: Any) -> Any | None:
    return getattr(output, "latent_dist", None)


def image_channels(net: Any) -> int:
    """C of the images that it takes."""
    return net.config.get("in_channels", net.config.get("num_channels", 3))


def num_codes(net: Any) -> int | None:
    """K of a tokenizer (of each level); None if `net` is none."""
    if isinstance(net, DiscreteAutoencoder):
        return net.quantize.num_codes
    return net.config.get("num_vq_embeddings")


def num_levels(net: Any) -> int:
    """Codes for each position; more than 1 of a residual quantiser."""
    return net.quantize.num_levels if isinstance(net, DiscreteAutoencoder) else 1


def num_codebooks(net: Any) -> int:
    """Of a tokenizer: one, which levels share, or one for each level."""
    return net.quantize.num_codebooks if isinstance(net, DiscreteAutoencoder) else 1


@torch.no_grad()
def tokenize(net: Any, z: Tensor) -> Tensor:
    """Indices (B, h, w), of L levels (B, L, h, w), of the codes nearest to a tokenizer's latents,
    in 0..K - 1."""
    if isinstance(net, DiscreteAutoencoder):
        return net.quantize(z).indices
    _, _, (_, _, indices) = net.quantize(z)
    return indices.reshape(len(z), *z.shape[2:])


@torch.no_grad()
def decode_indices(net: Any, indices: Tensor, *, computation: Computation | None = None) -> Tensor:
    """Images of indices, as the network gives them, in about [-1, 1]."""
    if not isinstance(net, DiscreteAutoencoder):
        return decode(net, codes_of(net, indices), computation=computation)
    if computation is None:
        return net.decode_indices(indices).sample
    codes = net.quantize.codes(indices)
    return computation.decode(net, codes, force_not_quantize=True).sample


@torch.no_grad()
def codes_of(net: Any, indices: Tensor) -> Tensor:
    """The codes (B, D, h, w) of indices (B, h, w) of a stock `VQModel`; `decode` takes them: each
    is its own nearest."""
    codes = net.quantize.get_codebook_entry(indices.flatten(), None)  # (B * h * w, D)
    return codes.view(*indices.shape, -1).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class LatentShape:
    """Of an autoencoder's latents.

    Args:
        f: pixels on a side of one latent position.
        channels: d.
        fixed_size: pixels on a side of the only images the network makes; None where it follows
            those it is given.
    """

    f: int
    channels: int
    fixed_size: int | None = None


@torch.no_grad()
def measure_shape(net: Any) -> LatentShape:
    """From the config of an AutoencoderKL, else by encoding and decoding a grey image.

    Raises:
        UserError: the network does not take images.
    """
    if type(net) is AutoencoderKL:
        return LatentShape(downsampling_factor(net), net.config["latent_channels"])
    channels = image_channels(net)
    images = torch.zeros(1, channels, PROBE, PROBE, device=net.device, dtype=net.dtype)
    try:
        z = encode(net, images)
        recon = decode(net, z)
        f, fixed = recon.shape[3] // z.shape[3], recon.shape[3] != PROBE
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{type(net).__name__} does not encode and decode images as diffusers' image "
            f"autoencoders do ({type(error).__name__}: {reason})"
        ) from error
    return LatentShape(f, z.shape[1], recon.shape[3] if fixed else None)


def takes_unit_range(net: Any) -> bool:
    """Whether its pixels are in [0, 1]: AutoencoderRAE's, and those of aMUSEd's tokenizer.

    aMUSEd's is the one that looks codes up by index (`lookup_from_codebook`); its pipeline does not
    normalise images (diffusers, pipeline_amused_img2img.py).
    """
    return type(net).__name__ == "AutoencoderRAE" or bool(net.config.get("lookup_from_codebook"))


def _to_range_of(net: Any, images: Tensor) -> Tensor:
    return (images + 1) / 2 if takes_unit_range(net) else images
