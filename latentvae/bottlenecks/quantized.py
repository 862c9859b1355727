"""The interface of a discrete bottleneck: its outputs, and its methods for training and export.

features h (B, C, h, w) -> quantised z (B, D, h, w) and indices (B, h, w) in 0..K - 1

`B` batch, `C` feature channels, `D` code width, `h w` latent positions, `K` codes, `L` levels of a
residual quantiser, `N = B * h * w` vectors. C is equal to the code width D, except for
Gumbel-softmax, where C is equal to the number of codes K.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """The output of a discrete bottleneck, in float32 also under autocast.

    Attributes:
        z: the input of the decoder, codes of width D, (B, D, h, w). The gradient of `z` passes to
            the features.
        indices: indices of the codes, (B, h, w), int64 in 0..K - 1 for K codes. If each position
            has L codes, the shape is (B, L, h, w).
        losses: unweighted losses by name. Each loss is a scalar, a mean over vectors. `commitment`
            and `codebook` are also means over the channels. `sample_entropy`, `batch_entropy` and
            `kl` are in nats per token. The dict has no entry for a loss that the bottleneck does
            not compute.
        statistics: a dict of the tensors that `Quantizer.update` needs. The statistics are sums
            over the vectors of one rank, so they can be added over micro-steps and ranks. The dict
            is empty in eval mode, and if `update` changes nothing.
    """

    z: Tensor
    indices: Tensor
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]


class Quantizer(nn.Module):
    """Base class of discrete bottlenecks, also called quantisers.

    A subclass sets the attributes and defines `forward` and `codes`. The other methods have
    defaults for a bottleneck that learns only by gradient, or has nothing to learn.

    Attributes:
        kind: name of the bottleneck, a key of `table.BOTTLENECKS`.
        num_codes: number of codes K of each level.
        num_levels: number L of codes per position. Only a residual quantiser has more than 1 code
            per position.
        in_channels: number of channels C of the features.
        code_channels: number of channels D of the codes `z`.
        restart_threshold: `update` replaces a code whose use is below this fraction of the mean use
            of all codes. With 0, `update` never replaces a code.
    """

    kind: ClassVar[str]
    num_codes: int
    num_levels: int = 1
    in_channels: int
    code_channels: int
    restart_threshold: float = 0.0

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: 1 if all levels share a codebook, else the number of levels."""
        return 1

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise features, and return codes, indices, losses and statistics.

        Args:
            features: features of C channels, (B, C, h, w).
            temperature: temperature of the softmax, above 0. Only Gumbel-softmax uses this value,
                and only in training.
        """
        raise NotImplementedError  # Every bottleneck defines its own `forward`.

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes `z` (B, D, h, w) for indices (B, h, w) or (B, L, h, w).

        D is the code width, and L is the number of codes per position. The result equals `z` of
        `forward`, except for Gumbel-softmax in training, where `z` depends on random noise.
        """
        raise NotImplementedError  # Every bottleneck defines its own `codes`.

    def initialise(
        self,
        features: Tensor,
        *,
        generator: torch.Generator,
        batch_vectors: int | None = None,
    ) -> None:
        """Set the codebook by k-means before training. The method of this base class does nothing.

        For the same features and generator, the codebook is the same on every rank.

        Args:
            features: N vectors of C channels, (N, C).
            generator: random generator on the CPU.
            batch_vectors: number of vectors in one update, over all ranks. The moving averages
                start with counts (vectors per code) whose sum is this number. The default is N.
        """

    def update(
        self, statistics: dict[str, Tensor], *, features: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Update the moving averages of the codes, and replace unused codes.

        Call this method once per update, after the optimiser's step. The method of this base class
        changes nothing.

        Args:
            statistics: statistics of the complete update, summed over micro-steps and ranks.
            features: N vectors of C channels of the last micro-step on all ranks, (N, C). Unused
                codes are replaced by some of these vectors ("restart").
            generator: random generator on the CPU, which chooses the vectors that replace unused
                codes. The generator must have the same state on every rank.

        Returns:
            The number of replaced codes, as a scalar tensor on the device. The method does not wait
            until the device has computed this number.
        """
        return torch.zeros((), dtype=torch.int64, device=features.device)

    def why_not_listed(self) -> str:
        """Return "" if a nearest-code search finds the same codes as `forward`, else why not.

        diffusers' `VQModel` makes this search in a list of codes. The method `listed_codes` returns
        the list. The returned reason is a clause for use in a longer sentence.
        """
        return f"the quantiser {self.kind} does not search for the nearest code in a list"

    def listed_codes(self) -> Tensor:
        """Return a new tensor of all K codes of width D, (K, D), float32, in index order.

        For each vector, `forward` chooses the code of this list that is nearest by Euclidean
        distance. Call this method only if `why_not_listed` returns "".
        """
        raise NotImplementedError(self.why_not_listed())
