"""The contract of a discrete bottleneck: what it returns, and what training and export ask of it.

features h (B, C, h, w) -> quantised z (B, D, h, w) and indices (B, h, w) in 0..K - 1

`B` batch, `C` feature channels, `D` code width (C = D, except that Gumbel has C = K), `h w` latent
positions, `K` codes, `L` levels of a residual quantiser, `N = B * h * w` vectors.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What a discrete bottleneck makes of features, float32 under any autocast.

    Attributes:
        z: what the decoder reads, (B, D, h, w). Its gradient passes to the features.
        indices: (B, h, w), int64 in 0..K - 1. With L levels (B, L, h, w).
        losses: unweighted scalars by name, means over vectors. `commitment` and `codebook` are also
            means over D. `sample_entropy`, `batch_entropy` and `kl` are in nats per token. A loss
            that the bottleneck does not have is absent.
        statistics: what `update` learns from, by name. They are sums over the vectors of this
            rank, so those of micro-steps and ranks can be added. Empty if `update` learns nothing.
    """

    z: Tensor
    indices: Tensor
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]


class Quantizer(nn.Module):
    """A discrete bottleneck. It does not count updates: values of schedules come as arguments.

    A subclass sets the sizes and defines `forward` and `codes`. The other methods have defaults for
    a bottleneck that learns only by gradient, or has nothing to learn.

    Attributes:
        kind: its name in the table and in presets.
        num_codes: K, of each level.
        num_levels: L. It is 1, except for a residual quantiser.
        in_channels: C, channels of the features.
        code_channels: D, channels of `z`.
        restart_threshold: share of the mean use below which `update` restarts a code. 0 never does.
    """

    kind: ClassVar[str]
    num_codes: int
    num_levels: int = 1
    in_channels: int
    code_channels: int
    restart_threshold: float = 0.0

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: one that all levels share, or one for each level."""
        return 1

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise features.

        Args:
            features: (B, C, h, w).
            temperature: above 0. Only Gumbel-softmax uses it, in training.
        """
        raise NotImplementedError  # every bottleneck has its own

    def codes(self, indices: Tensor) -> Tensor:
        """Return `z` (B, D, h, w) of indices (B, h, w) or (B, L, h, w), equal to that of `forward`.

        In training, `z` of Gumbel-softmax is a mixture of codes and so differs.
        """
        raise NotImplementedError  # every bottleneck has its own

    def initialise(
        self,
        features: Tensor,
        *,
        generator: torch.Generator,
        batch_vectors: int | None = None,
    ) -> None:
        """Set the codebook by k-means before training. By default there is nothing to set.

        The result is the same on every rank for the same features and generator.

        Args:
            features: (N, C).
            generator: on the CPU.
            batch_vectors: number of vectors of an update on all ranks. Counts of moving averages
                start as if one update had so many vectors. Default: N.
        """

    def update(
        self, statistics: dict[str, Tensor], *, features: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Learn from statistics: moving averages and the restart of unused codes.

        Call it once per update, after the optimiser's step. By default there is nothing to learn.

        Args:
            statistics: those of the whole update, added over micro-steps and ranks.
            features: vectors of the last micro-step, (N, C), joined over ranks. Unused codes
                restart at some of them.
            generator: chooses these vectors. On the CPU, in the same state on every rank.

        Returns:
            How many codes restarted, a scalar on the device (no host sync).
        """
        return torch.zeros((), dtype=torch.int64, device=features.device)

    def why_not_listed(self) -> str:
        """Return why a search for the nearest code in a list does not find the same codes.

        A stock `VQModel` makes such a search. The reason is a clause, and empty if the search in
        `listed_codes` does find them.
        """
        return f"the quantiser {self.kind} does not search for the nearest code in a list"

    def listed_codes(self) -> Tensor:
        """Return a new list of all codes, (K, D), float32, in the order of their indices.

        Quantising finds the nearest of them by Euclidean distance. Call it only if
        `why_not_listed` is empty.
        """
        raise NotImplementedError(self.why_not_listed())
