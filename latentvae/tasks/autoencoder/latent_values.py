"""Compute values for the log: the root mean square of latents, and the KL of their posteriors."""

import math

import torch
from torch import Tensor

from latentvae.losses.posterior import silent_channels
from latentvae.outputs import AutoencoderOutput


@torch.no_grad()
def latent_values(out: AutoencoderOutput) -> dict[str, Tensor]:
    """Return a dict from log names to scalars without gradient, computed from a batch's latents.

    The scalars are the root mean square of the latents and, if the network has a KL, the mean KL.
    If each channel has its own KL, the scalars include the number of channels with nearly no KL.
    """
    elements = sum(latent.z.numel() for latent in out.latents)
    shares = [latent.z.numel() / elements * latent.z.square().mean() for latent in out.latents]
    values = {"latent/rms": torch.stack(shares).sum().sqrt()}
    if out.kl is None:
        return values
    values["latent/kl_nats"] = out.kl.mean()
    values["latent/kl_bits_per_element"] = bits_per_element(out)
    silent = [
        silent_channels(latent.kl_per_channel, positions=latent.positions)
        for latent in out.latents
        if latent.kl_per_channel is not None
    ]
    if silent:
        values["latent/silent_channels"] = torch.stack(silent).sum()
    return values


@torch.no_grad()
def bits_per_element(out: AutoencoderOutput) -> Tensor:
    """Return the mean KL, a scalar: bits per latent element, or per token with Gumbel-softmax."""
    assert out.kl is not None
    return out.kl.mean() / (math.log(2.0) * out.kl_elements)
