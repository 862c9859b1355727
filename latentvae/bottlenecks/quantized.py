"""The contract of a discrete bottleneck: what it gives, and what training and export ask of it.

features h (B, C, h, w) -> quantised z (B, D, h, w) and indices (B, h, w) in 0..K - 1

`B` batch, `C` feature channels, `D` code width (C = D but for Gumbel, whose C is K), `h w` latent
positions, `K` codes, `L` levels of a residual quantiser, `N = B * h * w` vectors.
"""

from typing import ClassVar, NamedTuple

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


class Quantizer(nn.Module):
    """A discrete bottleneck. It has no counters: schedules come as arguments.

    A subclass sets the sizes and defines `forward` and `codes`. The other answers have defaults,
    those of a bottleneck that learns by gradient alone or has nothing to learn.

    Attributes:
        kind: its name in the table and in presets.
        num_codes: K, of each level.
        num_levels: L; 1 but for a residual quantiser.
        in_channels: C, channels of the features.
        code_channels: D, channels of `z`.
        restart_threshold: share of the mean use below which a code restarts in `update`; 0 never.
    """

    kind: ClassVar[str]
    num_codes: int
    num_levels: int = 1
    in_channels: int
    code_channels: int
    restart_threshold: float = 0.0

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: one, which all levels share, or one for each level."""
        return 1

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise features.

        Args:
            features: (B, C, h, w).
            temperature: above 0; only Gumbel-softmax, in training, has a use for it.
        """
        raise NotImplementedError  # every bottleneck has its own

    def codes(self, indices: Tensor) -> Tensor:
        """Return `z` (B, D, h, w) of indices (B, h, w) or (B, L, h, w), exactly as quantising
        gives it."""
        raise NotImplementedError  # every bottleneck has its own

    def initialise(
        self,
        features: Tensor,
        *,
        generator: torch.Generator,
        batch_vectors: int | None = None,
    ) -> None:
        """Set the codebook before training (k-means); by default there is nothing to set.

        The same on every rank for the same features and generator.

        Args:
            features: (N, C).
            generator: on the CPU.
            batch_vectors: vectors of an update on all ranks, at whose size moving averages start;
                None: N.
        """

    def update(
        self, statistics: dict[str, Tensor], *, features: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Learn from statistics once per update, after the optimiser: moving averages, and the
        restart of dead codes. By default there is nothing to learn.

        Args:
            statistics: of the whole update, added over micro-steps and ranks.
            features: vectors of the last micro-step, (N, C), joined over ranks: what dead codes
                restart at.
            generator: for that choice, on the CPU, in the same state on every rank.

        Returns:
            How many codes restarted, a scalar on the device (no host sync).
        """
        return torch.zeros((), dtype=torch.int64, device=features.device)

    def why_not_listed(self) -> str:
        """Return why no search of the nearest code in a list, as of a stock `VQModel`, finds the
        same codes: a clause, empty if `listed_codes` is such a list."""
        return f"the quantiser {self.kind} is no search of the nearest code in a list"

    def listed_codes(self) -> Tensor:
        """Return a new list of all codes, (K, D), float32, in the order of their indices.

        The nearest of them by Euclid is what quantising finds. Only where `why_not_listed` has no
        reason against it.
        """
        raise NotImplementedError(self.why_not_listed())
