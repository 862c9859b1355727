"""Gumbel-softmax (arXiv:1611.01144), the bottleneck of DALL-E's dVAE (arXiv:2102.12092).

logits (B, K, h, w) -> weights (B, K, h, w) with sum 1 -> z (B, D, h, w), the weighted mean of codes

In training the weights are softmax((logits + Gumbel noise) / temperature). In evaluation the
weights are the one-hot vector of the largest logit.

`B` batch, `K` codes, `D` code width.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from latentvae.bottlenecks.bottleneck_config import BottleneckConfig, CodeChannels, NumCodes
from latentvae.bottlenecks.gradients import straight_through
from latentvae.bottlenecks.quantized import Quantized, Quantizer
from latentvae.errors import UserError
from latentvae.option_marks import OfTheRun, Positive

Temperature = Annotated[float, Field(gt=0.0), OfTheRun()]


class GumbelConfig(BottleneckConfig):
    """Options of the quantiser Gumbel-softmax, which mixes codes with random weights.

    The weights are a relaxed sample from a softmax over all codes. The option kl_scale of the loss
    is the weight of the KL to a uniform distribution of codes.
    """

    type: Literal["gumbel"] = "gumbel"
    num_codes: NumCodes = Field(default=8192, description="Number of codes.")
    code_channels: CodeChannels = Field(default=128, description="Number of channels of each code.")
    straight_through: bool = Field(
        default=False,
        description=(
            "In training, give the decoder one code at each position instead of a mixture of "
            "codes. The gradient is still the gradient of the mixture (straight-through estimator)."
        ),
    )
    temperature: Temperature = Field(
        default=1.0,
        description=(
            "Temperature of the Gumbel-softmax at the first update. With a lower temperature, the "
            "sampled mixture of codes is closer to a single code."
        ),
    )
    final_temperature: Temperature = Field(
        default=0.0625,
        description=(
            "Temperature of the Gumbel-softmax after temperature_steps updates. From the first "
            "update on, the temperature falls to this value along half a cosine."
        ),
    )
    temperature_steps: Annotated[Positive, OfTheRun()] = Field(
        default=150_000,
        description="Number of updates until the temperature reaches final_temperature.",
    )

    @model_validator(mode="after")
    def _check(self) -> "GumbelConfig":
        if self.final_temperature > self.temperature:
            raise ValueError(
                "final_temperature must be at most temperature, because the temperature falls "
                f"(got {self.final_temperature:g} and {self.temperature:g})."
            )
        return self

    @property
    def has_kl(self) -> bool:
        """True, because the latent has a KL divergence to a prior (uniform over all codes)."""
        return True

    @property
    def why_no_linear_start(self) -> str:
        return "its features are logits. Give --init random."

    def temperature_at(self, update: int) -> float:
        """Return the temperature of the Gumbel-softmax in an update, counted from 0.

        The temperature falls along half a cosine (arXiv:2102.12092, appendix A.2).
        """
        start, end = self.temperature, self.final_temperature
        progress = min(update / self.temperature_steps, 1.0)
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


class GumbelQuantizer(Quantizer):
    """A `Quantizer` that learns its codebook, (K, D), through the decoder's gradient.

    `indices` are the numbers of the codes with the largest logits. In training too, these logits
    have no noise. The tokens of an image are its `indices` (arXiv:2102.12092, section 2.2). In
    evaluation, `z` is equal to `codes(indices)`. In training, `z` depends on noise, so `z` differs
    from `codes(indices)`.

    The loss `kl` is the divergence from softmax(logits), at temperature 1, to the uniform prior.
    With K codes, `kl` is between 0 and log K nats per token.

    Args:
        num_codes: number of codes K, also the number of feature channels.
        code_channels: code width D.
        straight_through: in training, `z` is the single code with the largest weight, but the
            gradient is that of the weighted mean of codes. By default, `z` is the weighted mean of
            codes.

    Raises:
        UserError: there are fewer than 2 codes, or no channel.
    """

    kind = "gumbel"

    def __init__(
        self, *, num_codes: int, code_channels: int, straight_through: bool = False
    ) -> None:
        super().__init__()
        if num_codes < 2 or code_channels < 1:
            raise UserError(
                "Gumbel-softmax needs at least 2 codes of at least 1 channel (got "
                f"{num_codes} codes of {code_channels} channels)."
            )
        self.num_codes = self.in_channels = num_codes
        self.code_channels = code_channels
        self.straight_through = straight_through
        self.codebook = nn.Parameter(torch.randn(num_codes, code_channels))

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise logits of K codes at each position, (B, K, h, w).

        Args:
            features: the logits.
            temperature: temperature of the softmax, above 0. In a training, this value comes from
                `GumbelConfig.temperature_at`. The temperature has no effect in evaluation.
        """
        assert features.shape[1] == self.in_channels, features.shape
        with torch.autocast(features.device.type, enabled=False):
            logits = features.float()
            indices = logits.argmax(1)
            z = self._mixture(logits, temperature) if self.training else self.codes(indices)
            return Quantized(z, indices, {"kl": _kl_to_uniform(logits)}, statistics={})

    def codes(self, indices: Tensor) -> Tensor:
        """Return the decoder's input `z` (B, D, h, w), codes of width D, for indices (B, h, w)."""
        codes = F.embedding(indices, self.codebook.float())
        return rearrange(codes, "B h w D -> B D h w").contiguous()

    def _mixture(self, logits: Tensor, temperature: float) -> Tensor:
        weights = F.gumbel_softmax(logits, tau=temperature, dim=1)
        if self.straight_through:
            # The option `hard` of torch computes 1 - weight + weight, which is rounded. So the
            # result would not be exactly one-hot.
            largest = weights.argmax(1, keepdim=True)
            one_hot = torch.zeros_like(weights).scatter(1, largest, 1.0)
            weights = straight_through(weights, one_hot)
        return torch.einsum("bkhw,kd->bdhw", weights, self.codebook.float())


def _kl_to_uniform(logits: Tensor) -> Tensor:
    """Return the mean over tokens of the KL from q = softmax(logits) to a uniform distribution.

    The KL of a token is sum_k q_k (log q_k + log K), for logits of K codes, (B, K, h, w).
    """
    log_q = logits.log_softmax(1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(1).mean()
