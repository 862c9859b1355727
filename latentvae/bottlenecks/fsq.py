"""Finite scalar quantisation (FSQ, arXiv:2309.15505).

Each channel is rounded to one of a few levels. The levels of all channels together are the code.

features h (B, D, h, w) -> bounded by tanh -> rounded -> z (B, D, h, w) in [-1, 1]

`B` batch, `D` channels, `L_i` levels of channel i, `K` = product of the L_i.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from latentvae.bottlenecks.bottleneck_config import MAX_CODES, BottleneckConfig, Shape
from latentvae.bottlenecks.gradients import straight_through
from latentvae.bottlenecks.quantized import Quantized, Quantizer
from latentvae.errors import UserError

MARGIN = 1e-3  # the range is wider by this share, so that finite features reach both end levels
MAX_LEVELS = 1000  # with more levels, this margin would give a level that does not exist


class FSQConfig(BottleneckConfig):
    """Options of the quantiser FSQ, which rounds each channel to a few levels."""

    type: Literal["fsq"] = "fsq"
    levels: Annotated[tuple[int, ...], Shape()] = Field(
        default=(8, 5, 5, 5),
        description=(
            "Number of levels of each channel of the latent: one number for each channel. Each "
            "channel is rounded to one of its levels, so the number of codes is the product of all "
            "these numbers."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "FSQConfig":
        if not self.levels or not all(3 <= number <= MAX_LEVELS for number in self.levels):
            hint = " For two levels use the preset lfq_f16." if 2 in self.levels else ""
            raise ValueError(
                f"levels must give each channel 3 to {MAX_LEVELS} levels, as (8, 5, 5, 5) does "
                f"(got {self.levels}).{hint}"
            )
        if math.prod(self.levels) > MAX_CODES:
            raise ValueError(
                f"levels must give at most {MAX_CODES:,} codes, but {self.levels} give "
                f"{math.prod(self.levels):,}. Use fewer channels or fewer levels."
            )
        return self


class FiniteScalarQuantizer(Quantizer):
    """A `Quantizer` that rounds each channel, without a codebook, losses or parameters.

    A channel h with L levels is bounded to tanh(h + s) (L - 1) (1 + margin) / 2 - o. The margin is
    0.001, so that finite h reach both end levels. The offset o is 1/2 for even L and 0 for odd L.
    The shift s is chosen by artanh, so that h = 0 gives the bounded value 0. The formula of this
    class follows the text of the paper (arXiv:2309.15505). The code listing in the paper has tan
    instead of artanh, and 1 - margin instead of 1 + margin. Cosmos and vector-quantize-pytorch use
    the formula of this class, so they compute the same indices. The bounded value is rounded to an
    integer from -floor(L / 2) to ceil(L / 2) - 1. Dividing the integer by floor(L / 2) gives z.

    A code index is sum_i d_i prod_{j < i} L_j. The digit d_i is the level of channel i, counted
    from the lowest level, in 0..L_i - 1.

    Args:
        levels: number of levels L_i of each channel i, 3 to 1000. The number of codes K is the
            product of all L_i. The paper uses (8, 6, 5) for K = 240, (8, 5, 5, 5) for K = 1000,
            (7, 5, 5, 5, 5) for K = 4375 and (8, 8, 8, 5, 5, 5) for K = 64000.

    Raises:
        UserError: there are no levels, a channel has fewer than 3 or more than 1000 levels, or
            there are too many codes for int64 indices.
    """

    kind = "fsq"

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)) -> None:
        super().__init__()
        _check(levels)
        self.num_codes = math.prod(levels)
        self.in_channels = self.code_channels = len(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", _per_channel(levels), persistent=False)
        self.register_buffer("basis", _per_channel(basis), persistent=False)

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise features of D channels, (B, D, h, w). ``temperature`` has no effect."""
        assert features.shape[1] == self.in_channels, features.shape
        half = self.levels // 2
        bounded = self._bound(features.float())
        rounded = bounded.detach().round()
        digits = rounded.to(torch.int64) + half
        z = straight_through(bounded / half, rounded / half)
        return Quantized(z, (digits * self.basis).sum(1), losses={}, statistics={})

    def codes(self, indices: Tensor) -> Tensor:
        """Return the decoder's input `z` of D channels, (B, D, h, w), for indices (B, h, w)."""
        half = self.levels // 2
        digits = indices.unsqueeze(1) // self.basis % self.levels
        return (digits - half).float() / half

    def _bound(self, features: Tensor) -> Tensor:
        half_range = (self.levels - 1) * ((1 + MARGIN) / 2)  # (1, D, 1, 1)
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(features + torch.atanh(offset / half_range)) * half_range - offset


def _check(levels: tuple[int, ...]) -> None:
    if not levels:
        raise UserError("FSQ needs levels, one number per channel, for example (8, 5, 5, 5).")
    for number in levels:
        if not 3 <= number <= MAX_LEVELS:
            hint = " For two levels use LFQ or BSQ." if number == 2 else ""
            raise UserError(
                f"FSQ must have 3 to {MAX_LEVELS} levels per channel (got {number}).{hint}"
            )
    if math.prod(levels) >= 2**63:
        raise UserError(
            f"FSQ with levels {tuple(levels)} has more codes than int64 indices can number. Use "
            "fewer channels or fewer levels."
        )


def _per_channel(numbers: list[int] | tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).view(1, -1, 1, 1)
