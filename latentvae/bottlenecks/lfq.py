"""Binary codes without a table: LFQ (MAGVIT-v2, arXiv:2310.05737) and BSQ (arXiv:2406.07548).

features h (B, D, h, w) [-> h / |h|] -> sign -> z (B, D, h, w), each element -s or s

In LFQ, each element of z is -1 or 1 (s = 1). BSQ divides each vector h by its length, and each
element of z is -s or s with s = 1 / sqrt(D). The entropy losses are computed from a softmax over
all K codes:

    p(c | h) = softmax_c(-|h - c|^2 / t) = prod_i sigmoid(4 s h_i b_i / t),  c = s b, b_i = -1 or 1

This softmax over codes is a product over the bits of a code, for two reasons. First, -|h - c|^2 is,
up to a constant, the sum over bits i of 2 s h_i b_i. Second, every combination of bits is a code.
(arXiv:2406.07548 proves that the softmax is a product for vectors on the unit sphere, but the proof
holds for all vectors.) So the entropy of a token is exactly the sum of its bits' entropies.

The mean of the softmax over tokens is not a product over bits, so the bits are divided into groups.
Within each group, the entropy of the mean is computed exactly. The entropies of the groups are
added, so no table of all K codes is needed. The sum of the groups' entropies is an upper bound of
the exact entropy, because entropy is subadditive. If the groups of bits are independent, this upper
bound is equal to the exact entropy.

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

MAX_BITS = 62  # because indices are int64
MAX_LISTED_BITS = 16  # a list has at most 2^16 = 65,536 codes

# Smallest probability in the logarithm of the batch entropy, similar to MAGVIT-v2. Codes far from
# all tokens have tiny probabilities. Without this limit, these codes would put almost the whole
# gradient on the few tokens that lie between two codes.
SMALLEST_SHARE = 1e-5


class LFQConfig(EntropyConfig):
    """Options of the quantisers LFQ and BSQ, which take the sign of each channel."""

    type: Literal["lfq"] = "lfq"
    num_bits: Annotated[int, Field(ge=1, le=24), Shape()] = Field(
        default=16,
        description=(
            "Number of latent channels. The sign of each channel gives one bit, so the number of "
            "codes is 2 ** num_bits."
        ),
    )
    spherical: Annotated[bool, Shape()] = Field(
        default=False,
        description=(
            "Use BSQ (binary spherical quantisation) instead of LFQ (lookup-free quantisation). In "
            "BSQ, vectors and codes lie on the unit sphere."
        ),
    )


class LookupFreeQuantizer(Quantizer):
    """A `Quantizer` that takes the sign of each channel, without a codebook or parameters.

    The sign of 0 is +1. The index of features h is the sum of 2^i over all channels i with
    h_i >= 0, so the first channel is the lowest bit (arXiv:2310.05737).

    The losses are `commitment`, `sample_entropy` (to minimise) and `batch_entropy` (to maximise).
    In training, `batch_entropy` is computed over the tokens of one micro-step (forward and backward
    pass) on all ranks. Every rank must have the same number of tokens. DDP averages the ranks'
    gradients, which gives the gradient for one large batch of the tokens of all ranks. In
    evaluation each rank uses only its own batch, because ranks can have different numbers of
    batches.

    Args:
        num_bits: number of bits of a code, also the number of feature channels. There are
            2^num_bits codes.
        spherical: use BSQ instead of LFQ: divide each vector by its length.
        entropy_temperature: temperature of the softmax in the entropy losses. The squared distances
            are divided by it. The default is 0.01 for LFQ and 1 for BSQ, the usual values.
        group_bits: number of bits in each group of the batch entropy. Each group needs a table of
            2^group_bits probabilities. The batch entropy is exact if `group_bits` is at least
            `num_bits`.

    Raises:
        UserError: a number of bits or the temperature is out of range.
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
        """Quantise features of D channels, (B, D, h, w). ``temperature`` has no effect."""
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
        """Return the decoder's input `z` of D channels, (B, D, h, w), for indices (B, h, w)."""
        return self._code(indices.unsqueeze(1) >> self._places(indices) & 1 == 1)

    def why_not_listed(self) -> str:
        """Return a reason if there are too many codes for a list, else ""."""
        if self.num_codes <= 2**MAX_LISTED_BITS:
            return ""
        most = 2**MAX_LISTED_BITS
        return f"its {self.num_codes:,} codes are too many to list (at most {most:,})"

    def listed_codes(self) -> Tensor:
        """Return all codes, see `Quantizer.listed_codes`."""
        return self.codes(torch.arange(self.num_codes).view(-1, 1, 1))[:, :, 0, 0].clone()

    def _code(self, bits: Tensor) -> Tensor:
        return (2.0 * bits.float() - 1.0) * self.scale

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(self.in_channels, device=like.device).view(1, -1, 1, 1)

    def _entropies(self, h: Tensor) -> dict[str, Tensor]:
        logits = h * (4.0 * self.scale / self.entropy_temperature)  # log-odds that a bit is 1
        logits = rearrange(logits, "B D h w -> (B h w) D")
        groups = logits.split(self.group_bits, dim=1)
        batch = [_batch_entropy(group, over_ranks=self.training) for group in groups]
        return {
            "sample_entropy": _bit_entropy(logits).sum(1).mean(),
            "batch_entropy": torch.stack(batch).sum(),
        }


def _bit_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of Bernoulli variables with the given logits, in nats.

    With l = |logit|: p = sigmoid(l), log p = -softplus(-l), log (1 - p) = log p - l. The entropy is
    computed as a sum of positive terms, so no digits are lost in a subtraction.
    """
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def _batch_entropy(logits: Tensor, *, over_ranks: bool) -> Tensor:
    """Average the joint distribution of bits over tokens, and return the average's entropy in nats.

    Args:
        logits: log-odds that a bit is 1, for the g bits of one group and N tokens, (N, g).
        over_ranks: take the mean over the tokens of all ranks.
    """
    # The joint probabilities of a token are an outer product of those of its low and high bits. The
    # sum over tokens is one matrix product. So the N x 2^g probabilities are never in memory.
    middle = logits.shape[1] // 2
    low, high = _joint(logits[:, :middle]), _joint(logits[:, middle:])
    p = low.t() @ high / len(logits)  # (2^middle, 2^(g - middle))
    if over_ranks:
        p = straight_through(p, all_reduce_mean(p))
    return -(p * p.clamp(min=SMALLEST_SHARE).log()).sum()


def _joint(logits: Tensor) -> Tensor:
    """Return the probabilities of all 2^g values of g independent bits, (N, 2^g).

    Args:
        logits: log-odds that a bit is 1, for g bits of each of N tokens, (N, g).
    """
    joint = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        one, zero = torch.sigmoid(bit)[:, None], torch.sigmoid(-bit)[:, None]
        joint = torch.cat([joint * zero, joint * one], dim=1)
    return joint


def _check(num_bits: int, group_bits: int, entropy_temperature: float) -> None:
    if not 1 <= num_bits <= MAX_BITS:
        raise UserError(f"num_bits must be from 1 to {MAX_BITS} (got {num_bits}).")
    if not 1 <= group_bits <= 20:
        raise UserError(f"group_bits must be from 1 to 20 (got {group_bits}).")
    if not entropy_temperature > 0:
        raise UserError(f"entropy_temperature must be above 0 (got {entropy_temperature}).")
