"""Binary codes without a table: LFQ (MAGVIT-v2, arXiv:2310.05737) and BSQ, the same on the unit
sphere (arXiv:2406.07548).

features h (B, D, h, w) [-> h / |h|] -> sign -> z (B, D, h, w), each element -s or s

s = 1, on the sphere s = 1 / sqrt(D). The entropies are those of a softmax over all K codes,

    p(c | h) = softmax_c(-|h - c|^2 / t) = prod_i sigmoid(4 s h_i b_i / t),  c = s b, b_i = -1 or 1,

a product, since -|h - c|^2 is a sum over bits of 2 s h_i b_i and what no bit changes, and the codes
are all combinations of bits (arXiv:2406.07548 has it for the sphere; nothing in it needs one). So
the entropy of a token is exactly the sum of its bits' entropies. The mean of p over tokens is no
product: its entropy is taken exactly within groups of bits and added over groups, an upper bound
(entropy is subadditive; equal if the groups are independent) that never needs all K.

`B` batch, `D` bits, `K` = 2^D codes, `N = B * h * w` tokens, `s` scale, `t` entropy temperature.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from latentvae.bottlenecks.bottleneck_config import EntropyConfig, Shape
from latentvae.bottlenecks.gradients import SMALLEST_NORM, straight_through
from latentvae.bottlenecks.quantized import Quantized, Quantizer
from latentvae.distributed import all_reduce_mean
from latentvae.errors import UserError

MAX_BITS = 62  # indices are int64
MAX_LISTED_BITS = 16  # 65,536 codes
# In the logarithm of the batch entropy a smaller share counts as this, about as in MAGVIT-v2, or
# codes that nothing is near would pull at the few tokens between two codes with all the gradient.
SMALLEST_SHARE = 1e-5


class LFQConfig(EntropyConfig):
    """The quantiser: the sign of each channel (LFQ; on the unit sphere BSQ); K = 2 ** bits."""

    type: Literal["lfq"] = "lfq"
    num_bits: Annotated[int, Field(ge=1, le=24), Shape()] = Field(
        default=16, description="Channels, log2 K."
    )
    spherical: Annotated[bool, Shape()] = Field(
        default=False, description="BSQ: vectors and codes on the unit sphere."
    )


class LookupFreeQuantizer(Quantizer):
    """A `Quantizer` without a codebook or parameters; sign(0) is +1.

    The index is sum_i 2^i [h_i >= 0]: the first channel is the lowest bit (arXiv:2310.05737).

    Losses: `commitment`, `sample_entropy` (to be made small), `batch_entropy` (to be made large).
    In training the batch is one micro-step of all ranks, which hold equally many tokens: gradients
    that are then averaged over ranks, as DDP does, are those of the joined batch. In evaluation it
    is this rank's own, so that ranks may differ in the number of batches.

    Args:
        num_bits: D = log2 K, also the channels of the features.
        spherical: BSQ; else LFQ.
        entropy_temperature: t, in squared units of h; None: 0.01 for LFQ and 1 for BSQ, as is
            usual.
        group_bits: bits of a group of the batch entropy, which holds 2^group_bits numbers. From
            num_bits on it is exact, without a bound.

    Raises:
        UserError: bits or a temperature out of range.
    """

    kind = "lfq"

    def __init__(
        self,
        *,
        num_bits: int = 18,
        spherical: bool = False,
        entropy_temperature: float | None = None,
        group_bits: int = 12,
    ) -> None:
        super().__init__()
        if entropy_temperature is None:
            entropy_temperature = 1.0 if spherical else 0.01
        _check(num_bits, group_bits, entropy_temperature)
        self.num_codes = 2**num_bits
        self.in_channels = self.code_channels = num_bits
        self.spherical = spherical
        self.scale = num_bits**-0.5 if spherical else 1.0
        self.entropy_temperature = entropy_temperature
        self.group_bits = group_bits

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise (B, D, h, w). ``temperature`` has no use: see ``entropy_temperature``."""
        assert features.shape[1] == self.in_channels, features.shape
        with torch.autocast(features.device.type, enabled=False):
            h = features.float()
            if self.spherical:
                h = F.normalize(h, dim=1, eps=SMALLEST_NORM)
            bits = h.detach() >= 0
            code = self._code(bits)
            losses = {"commitment": F.mse_loss(h, code), **self._entropies(h)}
            indices = (bits.to(torch.int64) << self._places(h)).sum(1)
            return Quantized(straight_through(h, code), indices, losses, statistics={})

    def codes(self, indices: Tensor) -> Tensor:
        """(B, D, h, w) of indices (B, h, w)."""
        return self._code(indices.unsqueeze(1) >> self._places(indices) & 1 == 1)

    def why_not_listed(self) -> str:
        """Codes that are too many to list."""
        if self.num_codes <= 2**MAX_LISTED_BITS:
            return ""
        most = 2**MAX_LISTED_BITS
        return f"its {self.num_codes:,} codes are too many to list (at most {most:,})"

    def listed_codes(self) -> Tensor:
        """See `Quantizer.listed_codes`."""
        return self.codes(torch.arange(self.num_codes).view(-1, 1, 1))[:, :, 0, 0].clone()

    def _code(self, bits: Tensor) -> Tensor:
        return (2.0 * bits.float() - 1.0) * self.scale

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(self.in_channels, device=like.device).view(1, -1, 1, 1)

    def _entropies(self, h: Tensor) -> dict[str, Tensor]:
        logits = h * (4.0 * self.scale / self.entropy_temperature)  # of bit 1 against bit 0
        logits = rearrange(logits, "B D h w -> (B h w) D")
        groups = logits.split(self.group_bits, dim=1)
        batch = [_batch_entropy(group, over_ranks=self.training) for group in groups]
        return {
            "sample_entropy": _bit_entropy(logits).sum(1).mean(),
            "batch_entropy": torch.stack(batch).sum(),
        }


def _bit_entropy(logits: Tensor) -> Tensor:
    """Of Bernoulli variables, in nats. With l = |logit|: p = sigmoid(l), log p = -softplus(-l),
    log (1 - p) = log p - l. Every term is positive, so nothing cancels."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def _batch_entropy(logits: Tensor, *, over_ranks: bool) -> Tensor:
    """Entropy of the mean over tokens of the joint distribution of a group's bits, in nats.

    Args:
        logits: (N, g).
        over_ranks: take the mean over the tokens of all ranks.
    """
    # Sums over tokens of outer products are a matrix product: N x 2^g numbers never exist at once.
    middle = logits.shape[1] // 2
    low, high = _joint(logits[:, :middle]), _joint(logits[:, middle:])
    p = low.t() @ high / len(logits)  # (2^middle, 2^(g - middle))
    if over_ranks:
        p = straight_through(p, all_reduce_mean(p))
    return -(p * p.clamp(min=SMALLEST_SHARE).log()).sum()


def _joint(logits: Tensor) -> Tensor:
    """Probabilities of all combinations of independent bits, (N, g) -> (N, 2^g)."""
    joint = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        one, zero = torch.sigmoid(bit)[:, None], torch.sigmoid(-bit)[:, None]
        joint = torch.cat([joint * zero, joint * one], dim=1)
    return joint


def _check(num_bits: int, group_bits: int, entropy_temperature: float) -> None:
    if not 1 <= num_bits <= MAX_BITS:
        raise UserError(f"num_bits is {num_bits}; codes have 1 to {MAX_BITS} bits")
    if not 1 <= group_bits <= 20:
        raise UserError(f"group_bits is {group_bits}; a group of the batch entropy has 1 to 20")
    if not entropy_temperature > 0:
        raise UserError(f"entropy_temperature is {entropy_temperature}; it lies above 0")
