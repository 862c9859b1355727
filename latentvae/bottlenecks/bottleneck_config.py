"""Options that several bottlenecks share. Each bottleneck's own Config is beside its class.

A Config also answers what a run asks of its bottleneck before and beside the module itself: the
base class `BottleneckConfig` holds every question with the answer of most.

`K` codes, `D` their width.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentvae.option_marks import (
    ChosenByPreset,
    Elsewhere,
    Mark,
    OfTheRun,
    Positive,
    Section,
    Share,
    Weight,
    marked,
    marks,
)

MAX_CODES = 2**24  # whose use is counted


@dataclass(frozen=True)
class Shape(Mark):
    """A pretrained bottleneck decides it; how it continues to learn is the run's choice."""


@dataclass(frozen=True)
class WeightOf(Mark):
    """The weight of that term of `Quantized.losses`; no argument of the module."""

    term: str


@dataclass(frozen=True)
class Argument(Mark):
    """The module has another name for it."""

    name: str


@dataclass(frozen=True)
class KeepsCodesInUse(Mark):
    """A remedy against unused codes while its value is 0.

    Attributes:
        rank: which to try first, from 1.
        flag: what to give.
    """

    rank: int
    flag: str


NumCodes = Annotated[
    int,
    Field(ge=2, le=MAX_CODES),
    Shape(),
    Elsewhere("codebook_size n_embed num_embeddings num_vq_embeddings vocab_size"),
]
CodeChannels = Annotated[
    Positive,
    Shape(),
    Elsewhere("embed_dim vq_embed_dim codebook_dim codebook_embed_dim embedding_dim"),
]
GradientName = Annotated[Literal["straight_through", "rotation"], Elsewhere("rotation_trick")]


class BottleneckConfig(Section):
    """What a run asks of any bottleneck. By itself it stands for none.

    Attributes:
        type: the name in a preset that chooses the class.
    """

    type: Annotated[
        Any,
        ChosenByPreset(),
        Shape(),
        Elsewhere("quantizer quantizer_type quantize bottleneck"),
    ] = None

    @property
    def has_kl(self) -> bool:
        """Whether its latent has a KL divergence to a prior."""
        return False

    @property
    def starts_by_kmeans(self) -> bool:
        """Whether the codes of a new run start at features of training images."""
        return False

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: one, which all levels share, or one for each level."""
        return 1

    def temperature_at(self, update: int) -> float:
        """Return the temperature of an update, counted from 0."""
        return 1.0

    def arguments(self) -> dict[str, Any]:
        """Return `type` and what the module takes."""
        kind = type(self)
        values = self.model_dump(exclude={*marked(kind, OfTheRun), *marked(kind, WeightOf)})
        called = {name: mark.name for name, mark in marks(kind, Argument).items()}
        return {called.get(name, name): value for name, value in values.items()}

    def weights(self) -> dict[str, float]:
        """Return the weight of each of its losses by the name of the loss."""
        return {
            mark.term: getattr(self, name) for name, mark in marks(type(self), WeightOf).items()
        }

    def shape_of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the options that a pretrained module of this type decides, by what it was built
        with."""
        return {name: arguments[name] for name in marked(type(self), Shape) if name in arguments}

    def remedies(self) -> list[str]:
        """Return flags that keep codes in use and are not in use themselves, the first to try
        first."""
        found = marks(type(self), KeepsCodesInUse)
        idle = [mark for name, mark in found.items() if getattr(self, name) == 0]
        return [mark.flag for mark in sorted(idle, key=lambda mark: mark.rank)]


class CommitmentConfig(BottleneckConfig):
    """The encoder is drawn to its codes."""

    commitment_weight: Annotated[
        Weight,
        WeightOf("commitment"),
        Elsewhere("beta commitment_cost commit_loss_beta commit_weight"),
    ] = Field(default=0.25, description="Weight of the encoder's distance to its codes (beta).")


class EntropyConfig(CommitmentConfig):
    """Each vector is to be sure of its code, and the batch to use all codes."""

    entropy_weight: Annotated[
        Weight,
        WeightOf("sample_entropy"),
        KeepsCodesInUse(4, "--entropy_weight 0.1"),
        Elsewhere("entropy_loss_ratio entropy_loss_weight"),
    ] = Field(
        default=0.0,
        description="Weight of the entropy of each vector's soft assignment; 0 leaves it out.",
    )
    batch_entropy_gamma: Annotated[Weight, OfTheRun()] = Field(
        default=1.0,
        description="The entropy of the batch, to be large, counts so many times as much.",
    )
    entropy_temperature: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="Of the soft assignments; by default 0.01 (of BSQ 1)."
    )

    @model_validator(mode="after")
    def _check_entropy(self) -> "EntropyConfig":
        for name in ("entropy_temperature", "batch_entropy_gamma"):
            value = getattr(self, name)
            if not self.entropy_weight and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {value:g} has no meaning while entropy_weight is 0; give that too, "
                    "such as 0.1"
                )
        return self

    def weights(self) -> dict[str, float]:
        """See `BottleneckConfig.weights`. The entropy of the batch is to be large."""
        batch = {"batch_entropy": -self.entropy_weight * self.batch_entropy_gamma}
        return super().weights() | batch


class CodebookConfig(CommitmentConfig):
    """A list of codes that a loss draws to the encoder."""

    num_codes: NumCodes = Field(default=1024, description="Codes K (of each level).")
    code_channels: CodeChannels = Field(default=256, description="Width D of a code.")
    codebook_weight: Annotated[Weight, WeightOf("codebook")] = Field(
        default=1.0, description="Weight of the codes' distance to the encoder."
    )


class LearnedCodebookConfig(CodebookConfig):
    """Each code learns for itself, so some may fall out of use."""

    codebook_decay: Annotated[
        # The optimiser's average of the weights has the plain name.
        Annotated[float, Field(gt=0.0, lt=1.0)] | None,
        Argument("ema_decay"),
        Elsewhere("codebook_ema_decay"),
    ] = Field(
        default=None,
        description="Codes are moving averages of what they stand for; by default they learn.",
    )
    gradient: GradientName = Field(
        default="straight_through", description="How the decoder's gradient passes the codes."
    )
    restart_threshold: Annotated[
        Share,
        KeepsCodesInUse(1, "--restart_threshold 0.02"),
        Elsewhere("restart_unused_codes threshold_ema_dead_code"),
    ] = Field(
        default=0.0,
        description=(
            "Codes used less than this share of the mean restart at a vector of the batch; 0 never."
        ),
    )
    kmeans_iterations: Annotated[
        int,
        Field(ge=0),
        KeepsCodesInUse(2, "--kmeans_iterations 10"),
        Elsewhere("kmeans_init kmeans_iters"),
    ] = Field(default=0, description="Start the codes by k-means on training images; 0: at random.")

    @model_validator(mode="after")
    def _check_codebook(self) -> "LearnedCodebookConfig":
        default = type(self).model_fields["codebook_weight"].default
        if self.codebook_decay is not None and self.codebook_weight != default:
            raise ValueError(
                f"codebook_weight {self.codebook_weight:g} has no meaning with codebook_decay "
                f"{self.codebook_decay:g}: codes that are moving averages have no loss"
            )
        return self

    @property
    def starts_by_kmeans(self) -> bool:
        """Whether the codes of a new run start at features of training images."""
        return self.kmeans_iterations > 0
