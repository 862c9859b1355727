"""Options that several bottlenecks share. Each bottleneck's own Config is beside its class.

A Config also has the properties that a training needs before it builds the module. The base class
`BottleneckConfig` defines these properties, with values that fit most bottlenecks.

`K` codes, `D` code width.
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

MAX_CODES = 2**24  # an upper limit, because the use counter of each code takes memory


@dataclass(frozen=True)
class Shape(Mark):
    """Marks an option whose value fine-tuning takes from the pretrained bottleneck."""


@dataclass(frozen=True)
class WeightOf(Mark):
    """Marks the weight of a loss in `Quantized.losses`. The module does not take it as argument."""

    term: str


@dataclass(frozen=True)
class Argument(Mark):
    """Marks an option that has another name as an argument of the module."""

    name: str


@dataclass(frozen=True)
class KeepsCodesInUse(Mark):
    """Marks an option that can keep more codes in use. The value 0 turns the option off.

    Attributes:
        rank: position of the option in the order in which users should try them, from 1.
        flag: command-line flag with a recommended value.
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
    """Base class of all bottleneck options, with the properties that a training reads.

    Attributes:
        type: name of the bottleneck in a preset. The name chooses the class of the options.
    """

    type: Annotated[
        Any,
        ChosenByPreset(),
        Shape(),
        Elsewhere("quantizer quantizer_type quantize bottleneck"),
    ] = None

    @property
    def has_kl(self) -> bool:
        """Whether the latent has a KL divergence to a prior."""
        return False

    @property
    def starts_by_kmeans(self) -> bool:
        """Whether the codes of a new run start at features of training images."""
        return False

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: one that all levels share, or one for each level."""
        return 1

    def temperature_at(self, update: int) -> float:
        """Return the temperature of an update, counted from 0."""
        return 1.0

    def arguments(self) -> dict[str, Any]:
        """Return `type` and the arguments of the module."""
        kind = type(self)
        values = self.model_dump(exclude={*marked(kind, OfTheRun), *marked(kind, WeightOf)})
        called = {name: mark.name for name, mark in marks(kind, Argument).items()}
        return {called.get(name, name): value for name, value in values.items()}

    def weights(self) -> dict[str, float]:
        """Return the weight of each loss of the bottleneck, by the name of the loss."""
        return {
            mark.term: getattr(self, name) for name, mark in marks(type(self), WeightOf).items()
        }

    def shape_of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the options whose values come from a pretrained module of this type.

        Args:
            arguments: arguments with which the pretrained module was built.
        """
        return {name: arguments[name] for name in marked(type(self), Shape) if name in arguments}

    def remedies(self) -> list[str]:
        """Return the unset flags that can keep more codes in use, the recommended ones first."""
        found = marks(type(self), KeepsCodesInUse)
        idle = [mark for name, mark in found.items() if getattr(self, name) == 0]
        return [mark.flag for mark in sorted(idle, key=lambda mark: mark.rank)]


class CommitmentConfig(BottleneckConfig):
    """A loss that pulls the encoder's vectors towards their codes."""

    commitment_weight: Annotated[
        Weight,
        WeightOf("commitment"),
        Elsewhere("beta commitment_cost commit_loss_beta commit_weight"),
    ] = Field(
        default=0.25,
        description=(
            "Weight of the commitment loss (beta), the distance of the encoder's vectors to their "
            "codes."
        ),
    )


class EntropyConfig(CommitmentConfig):
    """Entropy losses: they make each vector's code certain, and make the batch use all codes."""

    entropy_weight: Annotated[
        Weight,
        WeightOf("sample_entropy"),
        KeepsCodesInUse(4, "--entropy_weight 0.1"),
        Elsewhere("entropy_loss_ratio entropy_loss_weight"),
    ] = Field(
        default=0.0,
        description=(
            "Weight of the loss that lowers the entropy of each vector's soft assignment to codes. "
            "0 leaves out all entropy losses."
        ),
    )
    batch_entropy_gamma: Annotated[Weight, OfTheRun()] = Field(
        default=1.0,
        description=(
            "Weight of the entropy of the soft assignments' mean over the batch, as a multiple of "
            "entropy_weight. Training maximises this entropy, so that all codes are used."
        ),
    )
    entropy_temperature: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description=(
            "Temperature of the soft assignments to codes in the entropy losses. Default: 0.01, "
            "and 1 for BSQ."
        ),
    )

    @model_validator(mode="after")
    def _check_entropy(self) -> "EntropyConfig":
        for name in ("entropy_temperature", "batch_entropy_gamma"):
            value = getattr(self, name)
            if not self.entropy_weight and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {value:g} has no effect while entropy_weight is 0. Set entropy_weight "
                    f"too, for example 0.1, or leave {name} out."
                )
        return self

    def weights(self) -> dict[str, float]:
        """Return the weights. The batch entropy has a negative weight, so that it is maximised."""
        batch = {"batch_entropy": -self.entropy_weight * self.batch_entropy_gamma}
        return super().weights() | batch


class CodebookConfig(CommitmentConfig):
    """A list of codes, and a loss that pulls the codes towards the encoder's vectors."""

    num_codes: NumCodes = Field(
        default=1024,
        description=(
            "Number of codes K. If the quantiser has several levels, each level has K codes."
        ),
    )
    code_channels: CodeChannels = Field(default=256, description="Width D of a code.")
    codebook_weight: Annotated[Weight, WeightOf("codebook")] = Field(
        default=1.0,
        description=(
            "Weight of the codebook loss, the distance of the codes to the encoder's vectors."
        ),
    )


class LearnedCodebookConfig(CodebookConfig):
    """A codebook whose codes learn separately, so that some codes may fall out of use."""

    codebook_decay: Annotated[
        # In a preset, the name `ema_decay` belongs to the moving average of the model's weights.
        Annotated[float, Field(gt=0.0, lt=1.0)] | None,
        Argument("ema_decay"),
        Elsewhere("codebook_ema_decay"),
    ] = Field(
        default=None,
        description=(
            "Make each code a moving average of the vectors that choose it, with this decay per "
            "update. By default the codes learn by gradient."
        ),
    )
    gradient: GradientName = Field(
        default="straight_through",
        description="How the decoder's gradient passes through the quantiser to the encoder.",
    )
    restart_threshold: Annotated[
        Share,
        KeepsCodesInUse(1, "--restart_threshold 0.1"),
        Elsewhere("restart_unused_codes threshold_ema_dead_code"),
    ] = Field(
        default=0.0,
        description=(
            "Restart a code at a vector of the batch when the code's use falls below this share of "
            "the mean use of codes. A smaller share is measured over more updates. 0 never "
            "restarts a code."
        ),
    )
    kmeans_iterations: Annotated[
        int,
        Field(ge=0),
        KeepsCodesInUse(2, "--kmeans_iterations 10"),
        Elsewhere("kmeans_init kmeans_iters"),
    ] = Field(
        default=0,
        description=(
            "Number of k-means iterations on training images that set the first codes. With 0 the "
            "first codes are random."
        ),
    )

    @model_validator(mode="after")
    def _check_codebook(self) -> "LearnedCodebookConfig":
        default = type(self).model_fields["codebook_weight"].default
        if self.codebook_decay is not None and self.codebook_weight != default:
            raise ValueError(
                f"codebook_weight {self.codebook_weight:g} has no effect with codebook_decay "
                f"{self.codebook_decay:g}, because codes that are moving averages have no codebook "
                "loss. Leave one of them out."
            )
        return self

    @property
    def starts_by_kmeans(self) -> bool:
        """Whether the codes of a new run start at features of training images."""
        return self.kmeans_iterations > 0
