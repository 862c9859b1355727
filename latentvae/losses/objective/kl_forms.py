"""Compute the KL term of the loss (plain, free bits or capacity) and the warm-up of its weight.

All KL terms are in nats per image. The options for free bits and capacity are in bits per latent
element (like the logged value `latent/kl_bits_per_element`), so that they do not depend on the
resolution. Free bits and capacity compare the KL with a limit. The gradient of the KL term depends
on whether the KL is above or below the limit. The limit is compared with the mean KL over all
ranks, so that several ranks give the same result as one rank with the images of all ranks.

`B` batch, `d` latent channels, `h w` latent space.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from latentvae.distributed import all_reduce_mean
from latentvae.losses.objective_config import ObjectiveConfig
from latentvae.outputs import AutoencoderOutput, Latent


class KLForm(Protocol):
    """A function that computes the KL term of the loss, such as the KL with free bits.

    Attributes:
        name: name of the term in `Loss.values` and `Loss.weights`. The log has the plain KL
            instead, under the name `loss/kl`.
    """

    name: str

    def __call__(self, out: AutoencoderOutput, *, update: int) -> Tensor:
        """Return the KL term in nats per image, with its graph.

        The result has one value per image, (B,), or is the mean over the batch.
        """
        ...


class KLFactor(Protocol):
    """A function that returns the number that multiplies the KL's weight in a given update."""

    def __call__(self, update: int) -> float: ...


@dataclass(frozen=True)
class PlainKL:
    """A KL loss that is the KL itself, without free bits or a capacity."""

    name = "loss/kl"

    def __call__(self, out: AutoencoderOutput, *, update: int) -> Tensor:
        assert out.kl is not None
        return out.kl


@dataclass(frozen=True)
class FreeBits:
    """A KL loss that does not push the KL of a channel below a limit, see `free_bits_kl`.

    If the KL is not known for each channel, the whole latent counts as one channel.

    Args:
        bits: lower limit for the KL of a channel, in bits per latent element.
    """

    bits: float
    name = "loss/kl_free_bits"

    def __call__(self, out: AutoencoderOutput, *, update: int) -> Tensor:
        latents = [self._of(latent) for latent in out.latents if latent.kl is not None]
        return torch.stack(latents).sum()

    def _of(self, latent: Latent) -> Tensor:
        if latent.kl_per_channel is None:
            assert latent.kl is not None
            return free_bits_kl(latent.kl[:, None], bits=self.bits, positions=latent.kl_elements)
        return free_bits_kl(latent.kl_per_channel, bits=self.bits, positions=latent.positions)


@dataclass(frozen=True)
class Capacity:
    """A KL loss that pulls the KL up or down to a capacity, see `capacity_kl`.

    Args:
        bits: final capacity, in bits per latent element.
        growth_updates: number of updates in which the capacity grows from 0.
    """

    bits: float
    growth_updates: int = 0
    name = "loss/kl_capacity"

    def __call__(self, out: AutoencoderOutput, *, update: int) -> Tensor:
        assert out.kl is not None
        bits = capacity(update, target=self.bits, growth_updates=self.growth_updates)
        return capacity_kl(out.kl, bits=bits, elements=out.kl_elements)


@dataclass(frozen=True)
class WarmUp:
    """A factor on the KL's weight that grows linearly from 0 to 1.

    Args:
        updates: number of updates until the factor is 1. With 0, the factor is always 1.
    """

    updates: int = 0

    def __call__(self, update: int) -> float:
        return kl_warmup(update, self.updates)


def kl_form(options: ObjectiveConfig) -> KLForm:
    """Return the KL term that the options choose: plain, with free bits, or with a capacity."""
    if options.free_bits:
        return FreeBits(options.free_bits)
    if options.kl_capacity:
        return Capacity(options.kl_capacity, options.kl_capacity_steps)
    return PlainKL()


def kl_warmup(update: int, warmup_updates: int) -> float:
    """Return the factor on the KL's weight in update ``update`` (from 0).

    The factor grows linearly from 0 to 1, and reaches 1 at update ``warmup_updates`` (Sonderby et
    al. 2016, arXiv:1602.02282).
    """
    return min(update / warmup_updates, 1.0) if warmup_updates else 1.0


def capacity(update: int, *, target: float, growth_updates: int) -> float:
    """Return the capacity, to which the KL is pulled, in update ``update`` (from 0).

    The capacity grows linearly from 0 to ``target``, and is equal to ``target`` from update
    ``growth_updates`` on (Burgess et al. 2018, arXiv:1804.03599).
    """
    return target * kl_warmup(update, growth_updates)


def free_bits_kl(kl_per_channel: Tensor, *, bits: float, positions: int) -> Tensor:
    """Return sum_j max(lambda, E[KL_j]) over channels j (arXiv:1606.04934, eq. 15).

    E[KL_j] is the mean KL of channel j over the images of one micro-step (forward and backward
    pass) on all ranks. A channel whose mean KL is below lambda has no gradient, so its KL is not
    reduced further.

    Args:
        kl_per_channel: KL of each of d channels in nats, summed over positions, (B, d).
        bits: lambda, in bits per latent element. The function converts lambda to nats and
            multiplies it by `positions`, so that it can be compared with KL_j.
        positions: number of latent positions h * w.

    Returns:
        A scalar in nats per image.
    """
    floor = bits * math.log(2.0) * positions
    local = kl_per_channel.float().mean(0)  # (d,)
    above = all_reduce_mean(local) > floor
    return torch.where(above, local, floor).sum()


def capacity_kl(kl: Tensor, *, bits: float, elements: int) -> Tensor:
    """Return |E[KL] - C|, which pulls the mean KL up or down to C (arXiv:1804.03599, eq. 8).

    Args:
        kl: KL of each image in nats, (B,).
        bits: capacity C in this update, in bits per latent element. The function converts C to nats
            per image.
        elements: number of elements of a latent, d * h * w.

    Returns:
        A scalar in nats per image for this rank. The mean of this scalar over all ranks is the
        value for the images of all ranks together.
    """
    target = bits * math.log(2.0) * elements
    local = kl.float().mean()
    side = torch.sign(all_reduce_mean(local) - target)
    return side * (local - target)
