"""Residual quantisation (RQ-VAE, arXiv:2203.01941).

Each level quantises the residual: the features minus the codes of the levels before it.

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
    """Options of the residual quantiser (RQ), which gives each position several codes.

    A vector is approximated by the sum of its codes. Each code approximates the vector minus the
    sum of the codes before it.
    """

    type: Literal["residual"] = "residual"
    num_levels: Annotated[Positive, Shape(), Elsewhere("num_quantizers")] = Field(
        default=4,
        description=(
            "Number of quantisers in a row, called levels. The first level quantises the encoder's "
            "vector, and each further level quantises the error of the levels before it. Each "
            "position of the latent has one code per level."
        ),
    )
    shared_codebook: Annotated[bool, Shape()] = Field(
        default=True,
        description=(
            "Use one codebook for all levels. If this option is off, each level has its own "
            "codebook."
        ),
    )

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: 1 if all levels share a codebook, else the number of levels."""
        return 1 if self.shared_codebook else self.num_levels


class ResidualQuantizer(Quantizer):
    """A `Quantizer` with L codes per position, whose sum is the decoder's input z.

    Level l quantises r_{l-1}, the features h minus the codes of the levels before it. The losses
    are means over levels. `commitment` is |h - sg(sum of the codes up to this level)|^2, as in
    RQ-VAE, and `codebook` is |sg(r_{l-1}) - code|^2. The function sg stops the gradient. The
    decoder's gradient passes from z to the features h in one step, not level by level. With
    separate codebooks, each level has its own statistics and buffers. With a shared codebook,
    statistics are sums over levels.

    Args:
        num_levels: number of levels L.
        num_codes: K, the number of codes of each level.
        code_channels: code width D, also the number of feature channels.
        shared_codebook: use one codebook for all levels, as RQ-VAE does. Otherwise each level has
            its own codebook.
        ema_decay, gradient, restart_threshold, kmeans_iterations: see `VectorQuantizer`. An unused
            code is replaced by a vector that its level quantises. In a shared codebook, a code can
            be replaced by a vector of any level.

    Raises:
        UserError: `num_levels` is below 1, or an argument of `VectorQuantizer` is wrong.
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
            raise UserError(f"num_levels must be at least 1 (got {num_levels}).")
        self.num_levels = num_levels
        self.num_codes = num_codes
        self.code_channels = self.in_channels = code_channels
        self.shared_codebook = shared_codebook
        self.restart_threshold = restart_threshold
        self.gradient = gradient_of(gradient)

        # one quantiser for all levels, or one for each
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

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: 1 if all levels share a codebook, else the number of levels."""
        return 1 if self.shared_codebook else self.num_levels

    @property
    def levels(self) -> list[VectorQuantizer]:
        """The quantiser of each level. With a shared codebook, all levels share one quantiser."""
        return [*self.codebooks] * (self.num_levels if self.shared_codebook else 1)  # type: ignore[list-item]

    @property
    def codebook(self) -> Tensor:
        """The K codes of width D of each of L levels, (L, K, D), float32."""
        return torch.stack([level.codebook for level in self.levels])

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise features of D channels, (B, D, h, w). ``temperature`` has no effect."""
        features = features.float()
        residual, found = features, []
        for level in self.levels:
            found.append(level(residual))
            residual = residual - found[-1].z.detach()

        indices = torch.stack([level.indices for level in found], dim=1)
        losses = {
            name: torch.stack([level.losses[name] for level in found]).mean()
            for name in found[0].losses
        }
        z = self._with_gradient(features, self.codes(indices))
        return Quantized(z, indices, losses, self._join([level.statistics for level in found]))

    def codes(self, indices: Tensor) -> Tensor:
        """Return the decoder's input `z` (B, D, h, w), of width D, for indices (B, L, h, w)."""
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
        """Set the codebooks by k-means of N features, (N, D), and of residuals, level by level.

        The residuals of a level are the features minus the codes of the levels before it. A shared
        codebook is set twice. First, k-means of the features sets the codebook, and the residuals
        of all levels are computed with this codebook. Then k-means of the features and the
        residuals together sets the codebook again.
        """
        features = features.detach().float()
        size = batch_vectors or len(features)

        # one codebook for all levels
        if self.shared_codebook:
            level, size = self.levels[0], self.num_levels * size
            level.initialise(features, generator=generator, batch_vectors=size)
            joined = torch.cat(list(self._residuals(features)))
            level.initialise(joined, generator=generator, batch_vectors=size)
            return

        # one codebook for each level
        for level in self.levels:
            level.initialise(features, generator=generator, batch_vectors=size)
            features = _residual(features, level)

    @torch.no_grad()
    def update(
        self, statistics: dict[str, Tensor], *, features: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Update the codebooks, see `Quantizer.update`."""
        some = features.detach().float()
        if self.restart_threshold > 0:  # at most K codes are replaced, so K residuals are enough
            order = torch.randperm(len(some), generator=generator)[: self.num_codes]
            some = some[order.to(some.device)]

        # one codebook for all levels
        if self.shared_codebook:
            joined = torch.cat(self._residuals(some)) if self.restart_threshold > 0 else some
            return self.levels[0].update(statistics, features=joined, generator=generator)

        # one codebook for each level: compute a level's residuals before its codes change
        restarted = torch.zeros((), dtype=torch.int64, device=features.device)
        for place, level in enumerate(self.levels):
            own = {name: values[place] for name, values in statistics.items()}
            residual = _residual(some, level) if self.restart_threshold > 0 else some
            restarted += level.update(own, features=some, generator=generator)
            some = residual
        return restarted

    def _with_gradient(self, features: Tensor, z: Tensor) -> Tensor:
        """Return the values of ``z``, and pass their gradient to the features."""
        B, _, h, w = features.shape
        vectors, quantised = (rearrange(t, "B D h w -> (B h w) D") for t in (features, z))
        passed = self.gradient(vectors, quantised)
        return rearrange(passed, "(B h w) D -> B D h w", B=B, h=h, w=w).contiguous()

    def _join(self, statistics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack the statistics of all levels on a new axis 0, or add them for a shared codebook."""
        joined = {name: torch.stack([own[name] for own in statistics]) for name in statistics[0]}
        if self.shared_codebook:
            return {name: values.sum(0) for name, values in joined.items()}
        return joined

    def _residuals(self, features: Tensor) -> list[Tensor]:
        """Return the N vectors that each level quantises, (N, D) per level, for code width D."""
        residuals = [features]
        for level in self.levels[:-1]:
            residuals.append(_residual(residuals[-1], level))
        return residuals


def _residual(vectors: Tensor, level: VectorQuantizer) -> Tensor:
    """Return N vectors of D channels, (N, D), minus their nearest codes."""
    codebook = level.codebook
    return vectors - codebook[nearest_codes(vectors, codebook)]
