"""Make a tokenizer from a trained KL autoencoder: a new quantiser between two 1x1 convolutions.

CODA (arXiv:2503.17760) and ReVQ (arXiv:2507.10547) also quantise a trained KL autoencoder, with
other layers around the quantiser.

    KL autoencoder  encoder -> quant_conv -> posterior mean -> post_quant_conv -> y -> decoder
    tokenizer       encoder -> y -> quant_conv -> quantize -> post_quant_conv -> y -> decoder

`quant_conv` and `post_quant_conv` of the KL autoencoder are folded into the last convolution of the
encoder. So the tokenizer's encoder returns `y`: what the KL autoencoder's decoder reads if the
latent is the posterior mean. The tokenizer has a new `quant_conv` and a new `post_quant_conv`,
which only convert between `y` and the quantiser's features. The tokenizer has the same decoder as
the KL autoencoder. If the new `post_quant_conv` is the inverse of the new `quant_conv`, the
tokenizer without its quantiser reconstructs images as the KL autoencoder does.

`B` batch, `d` latent channels, `C` channels of the quantiser's features, `N` positions.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from einops import einsum, rearrange
from torch import Tensor, nn

from latentvae.errors import UserError
from latentvae.models.conv.discrete_autoencoder import DiscreteAutoencoder
from latentvae.models.conv.stock_vq import SHARED, attention_levels

CHUNK_PIXELS = 2**16  # about this many pixels are encoded or decoded at a time
# About this many pixels are used to measure the decoder's Jacobian, which takes the most time.
PROBED_PIXELS = 2**18

# Smaller variances, and smaller eigenvalues of the importance matrix, are raised to this share of
# the largest.
LEAST_SHARE = 1e-6

# A direction in the space of the codes is ignored if its singular value is below this share of the
# largest.
LEAST_SINGULAR = 1e-4

# Value of the constant channel, divided by the root mean square length of the other channels. With
# 2, the PSNR at the start is 0.14 dB lower than with 4 (docs/experiments/discretise.md).
SPHERE_RADIUS = 4.0


@torch.no_grad()
def from_autoencoder_kl(
    net: AutoencoderKL, quantizer: Mapping[str, Any]
) -> DiscreteAutoencoder | None:
    """Return a tokenizer with the weights of a KL autoencoder and a new quantiser.

    The new convolutions `quant_conv` and `post_quant_conv` copy input channel i to output channel
    i, as far as both channels exist. `start_adapter` and `fit_decoder_side` set better weights.

    Args:
        net: the KL autoencoder, in float32.
        quantizer: type and arguments of the quantiser.

    Returns:
        The tokenizer. None if `DiscreteAutoencoder` does not support the blocks of `net`.

    Raises:
        UserError: the quantiser reads logits instead of features, as Gumbel-softmax does.
    """
    config = net.config
    attention = attention_levels(config)
    if attention is None:
        return None
    ours = DiscreteAutoencoder(
        **{name: config[name] for name in SHARED}, attention_levels=attention, quantizer=quantizer
    )
    if ours.quantize.in_channels != ours.quantize.code_channels:
        raise UserError(
            f"the quantiser {ours.quantize.kind} cannot discretise a KL autoencoder, because it "
            "reads logits instead of features. Give another preset, such as vq_small."
        )

    # fold the convolutions around the posterior mean into the encoder's last convolution
    weights = net.state_dict()
    weight, bias = (weights[f"encoder.conv_out.{name}"].double() for name in ("weight", "bias"))
    for name in ("quant_conv", "post_quant_conv"):
        conv: Any = getattr(net, name)
        if conv is not None:
            matrix = conv.weight[:, :, 0, 0].double()
            weight = einsum(matrix, weight, "o i, i c y x -> o c y x")
            bias = matrix @ bias + conv.bias
        weight, bias = (values[: config["latent_channels"]] for values in (weight, bias))
    weights |= {"encoder.conv_out.weight": weight.float(), "encoder.conv_out.bias": bias.float()}

    # copy all weights
    for name in ("encoder", "decoder"):
        prefix = f"{name}."
        part = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        getattr(ours, name).load_state_dict(part)
    for conv in (ours.quant_conv, ours.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return ours


@torch.no_grad()
def start_adapter(
    net: Any, images: Tensor, *, whiten: bool, on_sphere: bool, generator: torch.Generator
) -> None:
    """Set `quant_conv` so that features close to each other decode to similar images.

    Replacing a feature by the nearest code should change the image as little as possible. The
    change of the latent does not matter. So the distance between two latents `y` is measured by the
    change of the decoded pixels. J is the decoder's Jacobian at one latent position, J' is its
    transpose, and M is the mean of J' J over positions. The squared change of the pixels for a
    small change v of `y` is then about v' M v. The features are the first C principal components of
    sqrt(M) y, for a quantiser of C channels. No other C linear features of `y` reconstruct the
    pixels better.

    - If the quantiser has more channels than the latent, a random rotation spreads the principal
      components over all channels of the quantiser. Quantisers that round each channel separately
      (FSQ, LFQ) can then use every channel. Without `whiten`, the rotation keeps the distances
      between features.
    - `whiten` gives every channel the variance 1, because FSQ and LFQ expect channels of equal
      scale. Without `whiten`, the mean variance of the principal components is 1.
    - With `on_sphere`, the quantiser divides each feature vector by its length, so the length would
      be lost. To keep the length, the last channel of the features is a large constant, and only
      C - 1 channels have principal components. The constant moves all features into a small, almost
      flat part of the sphere, where the ratios of distances between features hardly change.

    Args:
        net: the tokenizer that `from_autoencoder_kl` returns.
        images: images in [-1, 1], such as (B, 3, H, W) for an RGB network.
        whiten: whether every channel of the features gets the variance 1.
        on_sphere: whether the quantiser divides each feature vector by its length.
        generator: random generator on the CPU.

    Raises:
        UserError: `on_sphere` is set, but the quantiser has only 1 channel.
    """
    latents, importance = _measured(net, images, generator=generator)
    mean = latents.mean(0)

    # principal components of the latents, measured in pixels
    root = _root(importance)
    covariance = root @ (latents - mean).T.cov(correction=0) @ root
    variances, axes = torch.linalg.eigh(covariance)
    variances, axes = variances.flip(0), axes.flip(1)
    variances = variances.clamp_min(LEAST_SHARE * variances[0])

    channels = net.quantize.in_channels - on_sphere
    if channels < 1:
        raise UserError(
            "a quantiser of 1 channel that divides each feature vector by its length cannot "
            "discretise a KL autoencoder. Give --code_channels 2 or more."
        )
    count = min(len(variances), channels)
    rows = axes.T[:count] @ root
    rows = rows / (variances[:count, None] if whiten else variances[:count].mean()).sqrt()

    # more channels than components
    if channels > count:
        spread = torch.randn(channels, count, generator=generator, dtype=torch.float64)
        spread = torch.linalg.qr(spread).Q
        rows = (spread / spread.norm(dim=1, keepdim=True) if whiten else spread) @ rows

    bias = -rows @ mean
    if on_sphere:
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])
        bias = torch.cat([bias, bias.new_full((1,), SPHERE_RADIUS * count**0.5)])
    _set(net.quant_conv, rows, bias)


@torch.no_grad()
def fit_decoder_side(net: Any, images: Tensor) -> None:
    """Set `post_quant_conv` by least squares, to predict the encoder's output from the codes.

    The decoder of an autoencoder that was discretised expects the encoder's output as its input.
    Call this function after the codebook is initialised.
    """
    codes, latents = [], []
    for part in _chunks(net, images):
        y = net.encoder(part)
        codes.append(_rows(net.quantize(net.quant_conv(y)).z))
        latents.append(_rows(y))
    z, y = torch.cat(codes), torch.cat(latents)

    # codes may lie in a subspace, where many solutions fit: take the smallest
    centre = z.mean(0)
    solution = torch.linalg.lstsq(
        z - centre, y - y.mean(0), rcond=LEAST_SINGULAR, driver="gelsd"
    ).solution.T
    _set(net.post_quant_conv, solution, y.mean(0) - solution @ centre)


def _measured(net: Any, images: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return latents y (N, d) at N positions, and the importance M (d, d) of the d latent channels.

    M is the mean of J' J, where J is the decoder's Jacobian and J' is its transpose. J itself is
    never computed. If the backward pass gets random values u of variance 1 as the gradient of the
    pixels, it returns g = J' u, and the mean of g g' over random u is J' J.
    """
    latents = [net.encoder(part) for part in _chunks(net, images)]
    gradients = []
    for y in latents[: PROBED_PIXELS // CHUNK_PIXELS]:
        with torch.enable_grad():
            recon = net.decoder(y.requires_grad_())
        noise = torch.randn(recon.shape, generator=generator).to(recon)
        gradients.append(_rows(torch.autograd.grad(recon, y, noise)[0]))
    gradient = torch.cat(gradients)
    return _rows(torch.cat(latents).detach()), gradient.T @ gradient / len(gradient)


def _root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric matrix whose eigenvalues are not negative."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(LEAST_SHARE * values[-1]).sqrt() @ vectors.T


def _chunks(net: Any, images: Tensor) -> Iterator[Tensor]:
    count = max(1, CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    return (part.to(net.device) for part in images.split(count))


def _rows(values: Tensor) -> Tensor:
    """Return maps (B, c, h, w) as rows (B * h * w, c) in float64 on the CPU."""
    return rearrange(values, "B c h w -> (B h w) c").double().cpu()


def _set(conv: nn.Conv2d, matrix: Tensor, bias: Tensor) -> None:
    conv.weight.copy_(matrix[:, :, None, None])
    conv.bias.copy_(bias)  # type: ignore[union-attr]
