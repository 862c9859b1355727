"""Options of the discrete bottleneck: one class for each type, which the preset chooses."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from latentvae.options import Positive, Section, Share, Weight, tag_in

MAX_CODES = 2**24  # whose use is counted
Codes = Annotated[int, Field(ge=2, le=MAX_CODES)]


class QuantizerConfig(Section):
    """What all types have: their weights in the objective.

    Attributes:
        type: the name in a preset that chooses the class.
        WEIGHTS: option -> term of `Quantized.losses`.
    """

    WEIGHTS: ClassVar[dict[str, str]] = {}
    SCHEDULES: ClassVar[frozenset[str]] = frozenset()  # options that the loop, not the module takes

    type: Any

    def arguments(self) -> dict[str, Any]:
        """What the module takes."""
        values = self.model_dump(exclude={*self.WEIGHTS, *self.SCHEDULES})
        if "codebook_decay" in values:  # the optimiser's average of the weights has the plain name
            values["ema_decay"] = values.pop("codebook_decay")
        return values

    def weights(self) -> dict[str, float]:
        """Weights of the latent losses."""
        return {term: getattr(self, option) for option, term in self.WEIGHTS.items()}


class _Commitment(QuantizerConfig):
    WEIGHTS: ClassVar[dict[str, str]] = {"commitment_weight": "commitment"}

    commitment_weight: Weight = Field(
        default=0.25, description="Weight of the encoder's distance to its codes (beta)."
    )


class _Entropy(_Commitment):
    WEIGHTS: ClassVar[dict[str, str]] = {
        **_Commitment.WEIGHTS,
        "entropy_weight": "sample_entropy",
    }
    SCHEDULES: ClassVar[frozenset[str]] = frozenset({"batch_entropy_gamma"})

    entropy_weight: Weight = Field(
        default=0.0,
        description="Weight of the entropy of each vector's soft assignment; 0 leaves it out.",
    )
    batch_entropy_gamma: Weight = Field(
        default=1.0,
        description="The entropy of the batch, to be large, counts so many times as much.",
    )
    entropy_temperature: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="Of the soft assignments; by default 0.01 (of BSQ 1)."
    )

    @model_validator(mode="after")
    def _check_entropy(self) -> "_Entropy":
        for name in ("entropy_temperature", "batch_entropy_gamma"):
            value = getattr(self, name)
            if not self.entropy_weight and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {value:g} has no meaning while entropy_weight is 0; give that too, "
                    "such as 0.1"
                )
        return self

    def weights(self) -> dict[str, float]:
        batch = {"batch_entropy": -self.entropy_weight * self.batch_entropy_gamma}
        return super().weights() | batch


class _Codebook(_Commitment):
    """A learned codebook."""

    WEIGHTS: ClassVar[dict[str, str]] = {**_Commitment.WEIGHTS, "codebook_weight": "codebook"}

    num_codes: Codes = Field(default=1024, description="Codes K (of each level).")
    code_channels: Positive = Field(default=256, description="Width D of a code.")
    codebook_weight: Weight = Field(
        default=1.0, description="Weight of the codes' distance to the encoder."
    )
    codebook_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None,
        description="Codes are moving averages of what they stand for; by default they learn.",
    )
    gradient: Literal["straight_through", "rotation"] = Field(
        default="straight_through", description="How the decoder's gradient passes the codes."
    )
    restart_threshold: Share = Field(
        default=0.0,
        description=(
            "Codes used less than this share of the mean restart at a vector of the batch; 0 never."
        ),
    )
    kmeans_iterations: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Start the codes by k-means on training images; 0: at random."
    )

    @model_validator(mode="after")
    def _check_codebook(self) -> "_Codebook":
        default = type(self).model_fields["codebook_weight"].default
        if self.codebook_decay is not None and self.codebook_weight != default:
            raise ValueError(
                f"codebook_weight {self.codebook_weight:g} has no meaning with codebook_decay "
                f"{self.codebook_decay:g}: codes that are moving averages have no loss"
            )
        return self


class VectorConfig(_Codebook, _Entropy):
    """The quantiser: nearest of K learned vectors (VQ)."""

    WEIGHTS: ClassVar[dict[str, str]] = {**_Entropy.WEIGHTS, **_Codebook.WEIGHTS}

    type: Literal["vq"] = "vq"
    l2_normalize: bool = Field(
        default=False, description="Vectors and codes on the unit sphere: nearest by cosine."
    )

    def arguments(self) -> dict[str, Any]:
        temperature = (self.entropy_temperature or 0.01) if self.entropy_weight else None
        return super().arguments() | {"entropy_temperature": temperature}


class ResidualConfig(_Codebook):
    """The quantiser: several codes for each position, each for what the last left (RQ)."""

    type: Literal["residual"] = "residual"
    num_levels: Positive = Field(default=4, description="Codes for each position.")
    shared_codebook: bool = Field(default=True, description="One codebook for all levels.")


class FSQConfig(QuantizerConfig):
    """The quantiser: each channel rounded to a few levels (FSQ)."""

    type: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = Field(
        default=(8, 5, 5, 5), description="Levels of each channel; K is their product."
    )

    @model_validator(mode="after")
    def _check(self) -> "FSQConfig":
        if not self.levels or not all(3 <= number <= 1000 for number in self.levels):
            hint = "; the preset lfq_f16 has two" if 2 in self.levels else ""
            raise ValueError(
                f"levels is {self.levels}; each channel has 3 to 1000, as in (8, 5, 5, 5){hint}"
            )
        if math.prod(self.levels) > MAX_CODES:
            raise ValueError(
                f"levels {self.levels} are {math.prod(self.levels):,} codes; at most "
                f"{MAX_CODES:,} are counted"
            )
        return self


class LFQConfig(_Entropy):
    """The quantiser: the sign of each channel (LFQ; on the unit sphere BSQ); K = 2 ** bits."""

    type: Literal["lfq"] = "lfq"
    num_bits: Annotated[int, Field(ge=1, le=24)] = Field(
        default=16, description="Channels, log2 K."
    )
    spherical: bool = Field(default=False, description="BSQ: vectors and codes on the unit sphere.")


class GumbelConfig(QuantizerConfig):
    """The quantiser: a relaxed sample of K logits (Gumbel-softmax); its KL has kl_scale."""

    type: Literal["gumbel"] = "gumbel"
    num_codes: Codes = Field(default=8192, description="Codes K.")
    code_channels: Positive = Field(default=128, description="Width D of a code.")
    straight_through: bool = Field(default=False, description="Hard samples, soft gradients.")
    temperature: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="Temperature of the first update."
    )
    final_temperature: Annotated[float, Field(gt=0.0)] = Field(
        default=0.0625, description="Temperature that a cosine then reaches."
    )
    temperature_steps: Positive = Field(
        default=150_000, description="Updates until the final temperature."
    )
    SCHEDULES: ClassVar[frozenset[str]] = frozenset(
        {"temperature", "final_temperature", "temperature_steps"}
    )

    @model_validator(mode="after")
    def _check(self) -> "GumbelConfig":
        if self.final_temperature > self.temperature:
            raise ValueError(
                f"final_temperature {self.final_temperature:g} is above temperature "
                f"{self.temperature:g}; it falls"
            )
        return self


QUANTIZERS: dict[str, type[QuantizerConfig]] = {
    "vq": VectorConfig,
    "residual": ResidualConfig,
    "fsq": FSQConfig,
    "lfq": LFQConfig,
    "gumbel": GumbelConfig,
}
AnyQuantizerConfig = Annotated[
    Annotated[VectorConfig, Tag("vq")]
    | Annotated[ResidualConfig, Tag("residual")]
    | Annotated[FSQConfig, Tag("fsq")]
    | Annotated[LFQConfig, Tag("lfq")]
    | Annotated[GumbelConfig, Tag("gumbel")],
    Discriminator(tag_in("type", "vq")),
]


# What a pretrained quantiser decides; how it goes on to learn is the run's to say.
_SHAPE = frozenset(
    "type num_codes code_channels l2_normalize levels num_bits spherical num_levels "
    "shared_codebook".split()
)


def shape_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a pretrained quantiser, by what it was built with, decides."""
    return {name: value for name, value in arguments.items() if name in _SHAPE}
