"""Residual quantisation (RQ-VAE, arXiv:2203.01941): each level quantises what the levels before it
left over.

r_0 = h, k_l = nearest(r_{l-1}), r_l = r_{l-1} - code(k_l), z = sum_l code(k_l)

`B` batch, `D` code width, `K` codes of a level, `L` levels, `N = B * h * w` vectors.
"""

from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from latentvae.bottlenecks.bottleneck_config import LearnedCodebookConfig, Shape
from latentvae.bottlenecks.gradients import gradient_of
from latentvae.bottlenecks.nearest import nearest_codes
from latentvae.bottlenecks.quantized import Quantized, Quantizer
from latentvae.bottlenecks.vector import VectorQuantizer
from latentvae.errors import UserError
from latentvae.option_marks import Elsewhere, Positive


class ResidualConfig(LearnedCodebookConfig):
    """The quantiser: several codes for each position, each for what the last left (RQ)."""

    type: Literal["residual"] = "residual"
    num_levels: Annotated[Positive, Shape(), Elsewhere("num_quantizers")] = Field(
        default=4, description="Codes for each position."
    )
    shared_codebook: Annotated[bool, Shape()] = Field(
        default=True, description="One codebook for all levels."
    )

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: one, which all levels share, or one for each level."""
        return 1 if self.shared_codebook else self.num_levels


class ResidualQuantizer(Quantizer):
    """A `Quantizer` with L codes per position, whose sum is z.

    The losses are means over levels: `commitment` of |h - sg(sum of the codes so far)|^2, as in
    RQ-VAE, `codebook` of |sg(r_{l-1}) - code|^2. The gradient passes from z to h once. Statistics
    and buffers of separate codebooks are kept by level; those of a shared one are sums over levels.

    Args:
        num_levels: L.
        num_codes: K, of each level.
        code_channels: D, also the channels of the features.
        shared_codebook: one codebook for all levels, as RQ-VAE has, or one for each.
        ema_decay, gradient, restart_threshold, kmeans_iterations: as of `VectorQuantizer`; dead
            codes restart at what is left over at their level, shared ones at that of any level.

    Raises:
        UserError: no level, or what `VectorQuantizer` refuses.
    """

    kind = "residual"

    def __init__(
        self,
        *,
        num_levels: int,
        num_codes: int,
        code_channels: int,
        shared_codebook: bool = True,
        ema_decay: float | None = None,
        gradient: str = "straight_through",
        restart_threshold: float = 0.0,
        kmeans_iterations: int = 10,
    ) -> None:
        super().__init__()
        if num_levels < 1:
            raise UserError(f"num_levels is {num_levels}; residual quantisation has at least 1")
        self.num_levels = num_levels
        self.num_codes = num_codes
        self.code_channels = self.in_channels = code_channels
        self.shared_codebook = shared_codebook
        self.restart_threshold = restart_threshold
        self.codebooks = nn.ModuleList(
            VectorQuantizer(
                num_codes=num_codes,
                code_channels=code_channels,
                ema_decay=ema_decay,
                gradient=gradient,
                restart_threshold=restart_threshold,
                kmeans_iterations=kmeans_iterations,
            )
            for _ in range(1 if shared_codebook else num_levels)
        )
        self.gradient = gradient_of(gradient)

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: one, which all levels share, or one for each level."""
        return 1 if self.shared_codebook else self.num_levels

    @property
    def levels(self) -> list[VectorQuantizer]:
        """The quantiser of each level; of a shared codebook the same one L times."""
        return [*self.codebooks] * (self.num_levels if self.shared_codebook else 1)  # type: ignore[list-item]

    @property
    def codebook(self) -> Tensor:
        """The codes of each level, (L, K, D), float32."""
        return torch.stack([level.codebook for level in self.levels])

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise (B, D, h, w). ``temperature`` has no use."""
        features = features.float()
        left, found = features, []
        for level in self.levels:
            found.append(level(left))
            left = left - found[-1].z.detach()
        indices = torch.stack([level.indices for level in found], dim=1)
        losses = {
            name: torch.stack([level.losses[name] for level in found]).mean()
            for name in found[0].losses
        }
        z = self._passing(features, self.codes(indices))
        return Quantized(z, indices, losses, self._join([level.statistics for level in found]))

    def codes(self, indices: Tensor) -> Tensor:
        """(B, D, h, w) of indices (B, L, h, w)."""
        levels = zip(self.levels, indices.unbind(1), strict=True)
        return torch.stack([level.codes(level_indices) for level, level_indices in levels]).sum(0)

    @torch.no_grad()
    def initialise(
        self,
        features: Tensor,
        *,
        generator: torch.Generator,
        batch_vectors: int | None = None,
    ) -> None:
        """k-means of features (N, D) and of what is left over, level by level; a shared codebook
        first of the features, then of those with all that this leaves over."""
        features = features.detach().float()
        size = batch_vectors or len(features)
        if self.shared_codebook:
            level, size = self.levels[0], self.num_levels * size
            level.initialise(features, generator=generator, batch_vectors=size)
            joined = torch.cat(list(self._residuals(features)))
            level.initialise(joined, generator=generator, batch_vectors=size)
            return
        for level in self.levels:
            level.initialise(features, generator=generator, batch_vectors=size)
            features = _left_over(features, level)

    @torch.no_grad()
    def update(
        self, statistics: dict[str, Tensor], *, features: Tensor, generator: torch.Generator
    ) -> Tensor:
        """See `Quantizer.update`."""
        some = features.detach().float()
        if self.restart_threshold > 0:  # no more can restart, so search for no more
            order = torch.randperm(len(some), generator=generator)[: self.num_codes]
            some = some[order.to(some.device)]
        if self.shared_codebook:
            joined = torch.cat(self._residuals(some)) if self.restart_threshold > 0 else some
            return self.levels[0].update(statistics, features=joined, generator=generator)
        restarted = torch.zeros((), dtype=torch.int64, device=features.device)
        for place, level in enumerate(self.levels):
            own = {name: values[place] for name, values in statistics.items()}
            left = _left_over(some, level) if self.restart_threshold > 0 else some
            restarted += level.update(own, features=some, generator=generator)
            some = left
        return restarted

    def _passing(self, features: Tensor, z: Tensor) -> Tensor:
        """``z`` by value, with the gradient to the features."""
        B, _, h, w = features.shape
        vectors, quantised = (rearrange(t, "B D h w -> (B h w) D") for t in (features, z))
        passing = self.gradient(vectors, quantised)
        return rearrange(passing, "(B h w) D -> B D h w", B=B, h=h, w=w).contiguous()

    def _join(self, statistics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Of all levels: added for a shared codebook, else on a first axis of L."""
        joined = {name: torch.stack([own[name] for own in statistics]) for name in statistics[0]}
        if self.shared_codebook:
            return {name: values.sum(0) for name, values in joined.items()}
        return joined

    def _residuals(self, features: Tensor) -> list[Tensor]:
        """What each level quantises, (N, D) each."""
        residuals = [features]
        for level in self.levels[:-1]:
            residuals.append(_left_over(residuals[-1], level))
        return residuals


def _left_over(vectors: Tensor, level: VectorQuantizer) -> Tensor:
    """Vectors (N, D) less their nearest codes."""
    codebook = level.codebook
    return vectors - codebook[nearest_codes(vectors, codebook)]
