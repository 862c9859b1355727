"""Vector quantisation (VQ-VAE, arXiv:1711.00937), with several ways to keep the codes in use.

features h (B, D, h, w) -> vectors (N, D) -> nearest code -> z (B, D, h, w)

The codebook learns from a loss, or each code is a moving average of the vectors that chose it
(appendix A.1 of the VQ-VAE paper). With `l2_normalize`, vectors and codes lie on the unit sphere
(ViT-VQGAN, arXiv:2110.04627). By default, the gradient passes through the quantiser unchanged. With
the rotation trick (arXiv:2410.06424), the gradient passes as if the code were computed from the
vector by a constant rotation and a constant scale. With `restart_threshold`, codes that are rarely
used are replaced by vectors of the batch ("restart").

`B` batch, `D` code width, `K` codes, `N = B * h * w` vectors.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from latentvae.bottlenecks.bottleneck_config import (
    EntropyConfig,
    KeepsCodesInUse,
    LearnedCodebookConfig,
    Shape,
)
from latentvae.bottlenecks.entropy import code_entropies
from latentvae.bottlenecks.gradients import SMALLEST_NORM, gradient_of
from latentvae.bottlenecks.nearest import nearest_codes
from latentvae.bottlenecks.quantized import Quantized, Quantizer
from latentvae.errors import UserError
from latentvae.option_marks import Elsewhere

SMALLEST_SIZE = 1e-3  # A code that fewer vectors per update choose, on average, does not change.
LAPLACE = 1e-5  # Added to each count of the moving average (arXiv:1711.00937, appendix A.1).
SMALLEST_WINDOW = 5.0  # Least number of updates over which the use of a code is averaged.


class VectorConfig(LearnedCodebookConfig, EntropyConfig):
    """Options of the quantiser VQ, which replaces each vector by the nearest of K learned codes."""

    type: Literal["vq"] = "vq"
    l2_normalize: Annotated[
        bool,
        Shape(),
        KeepsCodesInUse(3, "--l2_normalize"),
        Elsewhere("l2_norm codebook_l2_norm use_cosine_sim"),
    ] = Field(
        default=False,
        description=(
            "Scale the encoder's vectors and the codes to length 1 (the unit sphere). The nearest "
            "code is then the code with the largest cosine similarity."
        ),
    )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the module.

        The module computes entropies only if `entropy_weight` is above 0.
        """
        temperature = (self.entropy_temperature or 0.01) if self.entropy_weight else None
        return super().arguments() | {"entropy_temperature": temperature}


class VectorQuantizer(Quantizer):
    """A `Quantizer` that replaces each vector by the nearest code of a learned codebook.

    Args:
        num_codes: number of codes K.
        code_channels: code width D, also the number of feature channels.
        ema_decay: decay per update, in (0, 1), if the codebook consists of moving averages. With
            None, the codebook is a parameter and learns from the loss `codebook`.
        l2_normalize: put vectors and codes on the unit sphere, so that the nearest code is the one
            with the largest cosine similarity. The losses and the decoder get unit vectors.
        gradient: how the gradient passes from the codes to the features: `"straight_through"` or
            `"rotation"`.
        restart_threshold: replace a code by a vector of the batch ("restart") if its use is below
            this fraction of the mean use. With 0, no code is ever replaced. The use of a code is a
            moving average of how often vectors choose it. The average covers the number of updates
            in which a code at the threshold is chosen about once, but at least 5 updates
            (`SMALLEST_WINDOW`).
        entropy_temperature: temperature of the softmax over negative squared distances. The losses
            `sample_entropy` and `batch_entropy` are entropies of this softmax. With None, these two
            losses are not computed.
        kmeans_iterations: k-means iterations in `initialise`. With 0, the codes stay random.

    Raises:
        UserError: there is no code or no channel, `ema_decay` is out of range, or the name of the
            gradient is unknown.
    """

    kind = "vq"
    weight: Tensor
    usage: Tensor
    cluster_size: Tensor
    embed_sum: Tensor

    def __init__(
        self,
        *,
        num_codes: int,
        code_channels: int,
        ema_decay: float | None = None,
        l2_normalize: bool = False,
        gradient: str = "straight_through",
        restart_threshold: float = 0.0,
        entropy_temperature: float | None = None,
        kmeans_iterations: int = 10,
    ) -> None:
        super().__init__()
        if num_codes < 1 or code_channels < 1:
            raise UserError(
                f"A codebook needs at least 1 code of at least 1 channel (got {num_codes} codes of "
                f"{code_channels} channels)."
            )
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise UserError(
                f"ema_decay must lie between 0 and 1, for example 0.99 (got {ema_decay})."
            )

        # options
        self.gradient = gradient_of(gradient)
        self.num_codes = num_codes
        self.code_channels = self.in_channels = code_channels
        self.ema_decay = ema_decay
        self.l2_normalize = l2_normalize
        self.restart_threshold = restart_threshold
        self.entropy_temperature = entropy_temperature
        self.kmeans_iterations = kmeans_iterations

        # random codes
        weight = torch.empty(num_codes, code_channels)
        if l2_normalize:
            weight = F.normalize(weight.normal_(), dim=1)
        else:
            weight.uniform_(-1 / num_codes, 1 / num_codes)

        # the codebook and its averages
        # A usage of 1 means that a code is used as often as the average code. The usage starts at a
        # value at which a code that no vector chooses is replaced after one window.
        self.start_usage = min(math.e * restart_threshold, 1.0)
        self.register_buffer("usage", torch.full((num_codes,), self.start_usage))
        if ema_decay is None:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("cluster_size", torch.ones(num_codes))
            self.register_buffer("embed_sum", weight.clone())

    @property
    def codebook(self) -> Tensor:
        """The K codes that the decoder reads, of width D, (K, D), float32."""
        return self._normalised(self.weight.float())

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise features of D channels, (B, D, h, w). ``temperature`` has no effect.

        The statistics that `update` needs are computed only in training mode.
        """
        assert features.shape[1] == self.in_channels, features.shape
        with torch.autocast(features.device.type, enabled=False):
            B, _, h, w = features.shape
            vectors = self._normalised(rearrange(features.float(), "B D h w -> (B h w) D"))

            codebook = self.codebook
            indices = nearest_codes(vectors, codebook)
            quantised = F.embedding(indices, codebook)
            z = self.gradient(vectors, quantised)
            z = rearrange(z, "(B h w) D -> B D h w", B=B, h=h, w=w)

            losses = self._losses(vectors, quantised, codebook)
            statistics = self._statistics(vectors.detach(), indices) if self.training else {}
        return Quantized(z.contiguous(), indices.view(B, h, w), losses, statistics)

    def codes(self, indices: Tensor) -> Tensor:
        """Return the decoder's input `z` (B, D, h, w), codes of width D, for indices (B, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "B h w D -> B D h w").contiguous()

    @torch.no_grad()
    def initialise(
        self,
        features: Tensor,
        *,
        generator: torch.Generator,
        batch_vectors: int | None = None,
    ) -> None:
        """Set the codes by k-means of N features, (N, D).

        With `kmeans_iterations` 0, the method does nothing.

        With `l2_normalize`, the centres of the clusters lie on the unit sphere. Moving averages
        start at the sums and counts of the clusters, scaled to the number of vectors in one update.
        The moving averages of a code start at 0 if its cluster is empty.
        """
        if self.kmeans_iterations == 0:
            return

        # first centres: random vectors
        counts = sums = torch.zeros(())
        vectors = self._normalised(features.detach().float())
        places = torch.randperm(len(vectors), generator=generator)
        places = places[torch.arange(self.num_codes) % len(vectors)]
        centres = vectors[places.to(vectors.device)]

        # iterations: the centre of an empty cluster is replaced by a random vector
        for _ in range(self.kmeans_iterations):
            indices = nearest_codes(vectors, centres)
            counts = _counts(indices, self.num_codes)
            sums = _sums(vectors, indices, self.num_codes)
            centres = self._normalised(sums / counts.clamp(min=1)[:, None])
            source, empty = _draw(vectors, counts == 0, generator=generator)
            centres = torch.where(empty[:, None], source, centres)

        # the codebook and its averages
        self._set(centres, torch.ones_like(self.usage, dtype=torch.bool), size=0.0)
        if self.ema_decay is not None:
            share = (batch_vectors or len(vectors)) / len(vectors)
            self.cluster_size.copy_(counts * share)
            self.embed_sum.copy_(sums * share)

    @torch.no_grad()
    def update(
        self, statistics: dict[str, Tensor], *, features: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Update the moving averages and replace unused codes, see `Quantizer.update`.

        Each unused code is replaced by a different vector of the features. If there are more unused
        codes than vectors, the remaining codes are not replaced in this update.
        """
        # Average the use over a window of 1 / (threshold * mean) updates. A code at the threshold
        # is used once in this window. With a shorter window, codes above the threshold could be
        # replaced by chance.
        counts = statistics["counts"]
        mean = counts.sum().clamp(min=1) / self.num_codes
        decay = torch.exp(-(self.restart_threshold * mean).clamp(max=1 / SMALLEST_WINDOW))
        self.usage.lerp_(counts / mean, 1 - decay)
        if self.ema_decay is not None:
            self._average(counts, statistics["sums"])

        # replace unused codes
        if self.restart_threshold == 0:
            return torch.zeros((), dtype=torch.int64, device=counts.device)
        vectors = self._normalised(features.detach().float())
        unused = self.usage < self.restart_threshold
        source, restarted = _draw(vectors, unused, generator=generator)
        # The average counts only a few vectors so far, so it quickly follows the next vectors.
        self._set(source, restarted, size=self.restart_threshold * mean)
        return restarted.sum()

    def why_not_listed(self) -> str:
        """Return "" (see `Quantizer.why_not_listed`), because the codebook is a list of codes.

        If the codes lie on the unit sphere, the nearest code by Euclidean distance is also the
        nearest by cosine similarity, even if the vector does not lie on the unit sphere.
        """
        return ""

    def listed_codes(self) -> Tensor:
        """Return all codes, see `Quantizer.listed_codes`."""
        return self.codebook.detach().clone()

    def _normalised(self, vectors: Tensor) -> Tensor:
        """Return the vectors, divided by their lengths if `l2_normalize` is set."""
        return F.normalize(vectors, dim=1, eps=SMALLEST_NORM) if self.l2_normalize else vectors

    def _losses(self, vectors: Tensor, quantised: Tensor, codebook: Tensor) -> dict[str, Tensor]:
        losses = {"commitment": F.mse_loss(vectors, quantised.detach())}
        if self.ema_decay is None:
            losses["codebook"] = F.mse_loss(quantised, vectors.detach())
        if self.entropy_temperature is not None:
            sample, batch = code_entropies(
                vectors,
                codebook,
                temperature=self.entropy_temperature,
                over_ranks=self.training,  # ranks may have different numbers of validation batches
            )
            losses |= {"sample_entropy": sample, "batch_entropy": batch}
        return losses

    def _statistics(self, vectors: Tensor, indices: Tensor) -> dict[str, Tensor]:
        statistics = {"counts": _counts(indices, self.num_codes)}
        if self.ema_decay is not None:
            statistics["sums"] = _sums(vectors, indices, self.num_codes)
        return statistics

    def _average(self, counts: Tensor, sums: Tensor) -> None:
        """Update the moving averages and the codes (arXiv:1711.00937, appendix A.1).

        Laplace smoothing keeps the average number of vectors of each code above 0.
        """
        assert self.ema_decay is not None
        self.cluster_size.lerp_(counts, 1 - self.ema_decay)
        self.embed_sum.lerp_(sums, 1 - self.ema_decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + LAPLACE) / (total + self.num_codes * LAPLACE) * total
        means = self._normalised(self.embed_sum / smoothed[:, None])
        # Without this limit, smoothing would move a code that no vector chooses to the origin.
        in_use = self.cluster_size[:, None] > SMALLEST_SIZE
        self.weight.copy_(torch.where(in_use, means, self.weight))

    def _set(self, codes: Tensor, mask: Tensor, *, size: Tensor | float) -> None:
        """Replace the K codes by ``codes`` (K, D) where ``mask`` (K,) is true.

        The moving averages of each replaced code are set as if ``size`` vectors, all equal to the
        new code, had chosen this code.
        """
        self.weight.copy_(torch.where(mask[:, None], codes, self.weight))
        self.usage.masked_fill_(mask, self.start_usage)
        if self.ema_decay is not None:
            self.cluster_size.copy_(torch.where(mask, size, self.cluster_size))
            self.embed_sum.copy_(torch.where(mask[:, None], codes * size, self.embed_sum))


def _counts(indices: Tensor, num_codes: int) -> Tensor:
    """Return the number of vectors that chose each of K codes, (K,), in float32."""
    ones = torch.ones(len(indices), device=indices.device)
    return torch.zeros(num_codes, device=indices.device).index_add_(0, indices, ones)


def _sums(vectors: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Return the sum of the vectors that chose each of K codes, (K, D).

    Args:
        vectors: N vectors of D channels, (N, D).
        indices: the code that each vector chose, (N,).
        num_codes: number of codes K.
    """
    # This sum is the gradient of F.embedding, which on a GPU sorts the indices first. `index_add_`
    # adds in random order on a GPU, so the results of the ranks would differ in the last digits.
    return torch.ops.aten.embedding_dense_backward(vectors, indices, num_codes, -1, False)


def _draw(vectors: Tensor, wanted: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a random vector for each code to replace, without waiting for the GPU.

    No vector is drawn twice.

    Args:
        vectors: N vectors of D channels, (N, D).
        wanted: True for the codes to replace among K codes, (K,).
        generator: random generator on the CPU.

    Returns:
        Vectors (K, D), and a mask (K,) of the codes that got a vector. If there are too few
        vectors, some codes to replace get no vector.
    """
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    place = wanted.cumsum(0) - 1
    given = wanted & (place < len(vectors))
    return vectors[order[place.clamp(0, len(vectors) - 1)]], given
