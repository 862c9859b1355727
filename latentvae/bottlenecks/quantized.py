"""What every discrete bottleneck gives, and what the loop asks of one: the contract of VQ, residual
VQ, FSQ, LFQ and Gumbel-softmax.

features h (B, C, h, w) -> quantised z (B, D, h, w) and indices (B, h, w) in 0..K - 1

`B` batch, `C` feature channels, `D` code width (C = D but for Gumbel, whose C is K), `h w` latent
positions, `K` codes, `L` levels of a residual quantiser, `N = B * h * w` vectors.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What a discrete bottleneck makes of features, float32 under any autocast.

    Attributes:
        z: what the decoder reads, (B, D, h, w); its gradient passes to the features.
        indices: (B, h, w), int64 in 0..K - 1; of L levels (B, L, h, w).
        losses: unweighted scalars by name, means over vectors (and over D, where it is a square):
            `commitment`, `codebook`, `sample_entropy`, `batch_entropy` (both nats per token), `kl`
            (nats per token). Those that a bottleneck does not have are absent.
        statistics: what `update` learns from, by name: sums over the vectors of this rank, so that
            micro-steps and ranks are added. Empty where nothing is learned so.
    """

    z: Tensor
    indices: Tensor
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]


class Quantizer(Protocol):
    """A discrete bottleneck: an `nn.Module` without counters, whose schedules come as arguments.

    Attributes:
        num_codes: K, of each level.
        num_levels: L; 1 but for a residual quantiser.
        in_channels: C, channels of the features.
        code_channels: D, channels of `z`.
    """

    num_codes: int
    num_levels: int
    in_channels: int
    code_channels: int

    def __call__(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise (B, C, h, w). Only Gumbel-softmax, in training, has a use for `temperature`."""
        ...

    def codes(self, indices: Tensor) -> Tensor:
        """`z` (B, D, h, w) of indices (B, h, w) or (B, L, h, w), exactly as quantising gives it."""
        ...

    def initialise(
        self,
        features: Tensor,
        *,
        generator: torch.Generator,
        batch_vectors: int | None = None,
    ) -> None:
        """Set the codebook from features (N, C) before training (k-means); a no-op where none is
        learned so. The same on every rank for the same features and generator.

        Args:
            batch_vectors: vectors of an update on all ranks, at whose size moving averages start;
                None: N.
        """
        ...

    def update(
        self, statistics: dict[str, Tensor], *, features: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Once per update, after the optimiser: moving averages and the restart of dead codes.

        Args:
            statistics: of the whole update, added over micro-steps and ranks.
            features: vectors of the last micro-step, (N, C), joined over ranks: what dead codes
                restart at.
            generator: for that choice, on the CPU, in the same state on every rank.

        Returns:
            How many codes restarted, a scalar on the device (no host sync).
        """
        ...


class GradientQuantizer(nn.Module):
    """The half of a `Quantizer` that learns by gradient alone, or has nothing to learn."""

    num_levels = 1

    def initialise(
        self,
        features: Tensor,
        *,
        generator: torch.Generator,
        batch_vectors: int | None = None,
    ) -> None:
        """Nothing to set."""

    def update(
        self, statistics: dict[str, Tensor], *, features: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Nothing to learn: 0 codes restarted."""
        return torch.zeros((), dtype=torch.int64, device=features.device)


def straight_through(vectors: Tensor, quantised: Tensor) -> Tensor:
    """``quantised`` exactly, with the gradient of ``vectors``."""
    return quantised.detach() + (vectors - vectors.detach())
