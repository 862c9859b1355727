"""Options that several bottlenecks share. Options of one bottleneck are in the file of its class.

A class of options also has properties that a training run reads before it builds the bottleneck.
The base class `BottleneckConfig` defines properties such as `has_kl`, with values that fit most
bottlenecks.

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

MAX_CODES = 2**24  # limit on K, because a counter for each code takes memory


@dataclass(frozen=True)
class Shape(Mark):
    """Marks an option whose value fine-tuning takes from the pretrained bottleneck."""


@dataclass(frozen=True)
class WeightOf(Mark):
    """Marks an option that is the weight of a loss of the bottleneck.

    The loss is `Quantized.losses[term]`. The option is not an argument of the bottleneck's module.
    """

    term: str


@dataclass(frozen=True)
class Argument(Mark):
    """Marks an option that the bottleneck's module takes under another argument name."""

    name: str


@dataclass(frozen=True)
class KeepsCodesInUse(Mark):
    """Marks an option that can keep more codes in use. The value 0 turns the option off.

    Attributes:
        rank: position of the option in the order in which users should try all options with this
            mark, from 1.
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
        type: name of the bottleneck. The name chooses the class of the options.
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
        """Whether a new run sets the initial codes by k-means on features of training images."""
        return False

    @property
    def why_no_linear_start(self) -> str:
        """The reason why the option `--init linear` does not work, with advice, or "".

        The option lets a new network start with weights that compute a linear code (PCA).
        """
        return ""

    @property
    def whitened_start(self) -> bool:
        """Whether `--init linear` (a start with PCA) gives each latent channel the variance 1."""
        return True

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks: one if all levels share a codebook, else one for each level."""
        return 1

    def temperature_at(self, update: int) -> float:
        """Return the softmax temperature in an update, counted from 0.

        Only Gumbel-softmax uses this temperature.
        """
        return 1.0

    def arguments(self) -> dict[str, Any]:
        """Return the option `type` and the arguments to build the bottleneck's module with."""
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
        """Return the options that fine-tuning takes from a pretrained module of this type.

        Args:
            arguments: arguments with which the pretrained module was built.
        """
        return {name: arguments[name] for name in marked(type(self), Shape) if name in arguments}

    def remedies(self) -> list[str]:
        """Return command-line flags that can keep more codes in use, in the order to try them.

        Flags of options that are already turned on are not included.
        """
        found = marks(type(self), KeepsCodesInUse)
        idle = [mark for name, mark in found.items() if getattr(self, name) == 0]
        return [mark.flag for mark in sorted(idle, key=lambda mark: mark.rank)]


class CommitmentConfig(BottleneckConfig):
    """Options of the commitment loss, which pulls the encoder's vectors towards their codes."""

    commitment_weight: Annotated[
        Weight,
        WeightOf("commitment"),
        Elsewhere("beta commitment_cost commit_loss_beta commit_weight"),
    ] = Field(
        default=0.25,
        description=(
            "Weight of the commitment loss (beta). The commitment loss is the mean squared "
            "distance of the encoder's vectors to their codes. With a larger weight, the vectors "
            "stay closer to their codes."
        ),
    )


class EntropyConfig(CommitmentConfig):
    """Options of the entropy losses.

    The entropy losses make each vector clearly nearest to one code, and make the batch use all
    codes.
    """

    entropy_weight: Annotated[
        Weight,
        WeightOf("sample_entropy"),
        KeepsCodesInUse(4, "--entropy_weight 0.1"),
        Elsewhere("entropy_loss_ratio entropy_loss_weight"),
    ] = Field(
        default=0.0,
        description=(
            "Weight of the loss that lowers the entropy of each vector's soft assignment (a "
            "softmax over all codes), so that each vector is clearly nearest to one code. 0 turns "
            "this loss and the batch entropy (see batch_entropy_gamma) off."
        ),
    )
    batch_entropy_gamma: Annotated[Weight, OfTheRun()] = Field(
        default=1.0,
        description=(
            "Weight of the batch entropy, as a multiple of entropy_weight. A soft assignment is a "
            "softmax over codes for one vector. The batch entropy is the entropy of the average of "
            "the soft assignments over the batch. Training maximises the batch entropy, so that "
            "all codes are used."
        ),
    )
    entropy_temperature: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description=(
            "Temperature of the softmax over codes in the entropy losses. With a lower "
            "temperature, the softmax is closer to a choice of a single code. The default is 1 for "
            "BSQ (see spherical) and 0.01 for all other quantisers."
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
        """Return the weight of each loss, by the name of the loss.

        The weight of the batch entropy is negative, because training maximises this entropy.
        """
        batch = {"batch_entropy": -self.entropy_weight * self.batch_entropy_gamma}
        return super().weights() | batch


class CodebookConfig(CommitmentConfig):
    """Options of a codebook, and of a loss that pulls the codes towards the encoder's vectors."""

    num_codes: NumCodes = Field(
        default=1024,
        description=(
            "Number of codes. If the quantiser has several levels, num_codes is the number of "
            "codes of each level."
        ),
    )
    code_channels: CodeChannels = Field(default=256, description="Number of channels of each code.")
    codebook_weight: Annotated[Weight, WeightOf("codebook")] = Field(
        default=1.0,
        description=(
            "Weight of the codebook loss. The codebook loss is the mean squared distance of the "
            "codes to the encoder's vectors."
        ),
    )


class LearnedCodebookConfig(CodebookConfig):
    """Options of a codebook in which each code is learned separately, so some may become unused."""

    codebook_decay: Annotated[
        # Outside this section, the name `ema_decay` is for the moving average of the weights.
        Annotated[float, Field(gt=0.0, lt=1.0)] | None,
        Argument("ema_decay"),
        Elsewhere("codebook_ema_decay"),
    ] = Field(
        default=None,
        description=(
            "Compute each code as a moving average of the encoder's vectors for which this code is "
            "the nearest one. The value of codebook_decay is the decay of the average per update, "
            "such as 0.99. A larger decay averages over more updates. By default, codes are not "
            "averages but learn by gradient descent."
        ),
    )
    gradient: GradientName = Field(
        default="straight_through",
        description=(
            "How the gradient passes from the decoder through the quantiser to the encoder. "
            "`straight_through` passes the gradient unchanged. `rotation` (the rotation trick) "
            "treats the code as the encoder's vector, rotated and scaled by constants, and passes "
            "the gradient back through this rotation and this scale."
        ),
    )
    restart_threshold: Annotated[
        Share,
        KeepsCodesInUse(1, "--restart_threshold 0.1"),
        Elsewhere("restart_unused_codes threshold_ema_dead_code"),
    ] = Field(
        default=0.0,
        description=(
            "Replace each rarely used code by one of the encoder's vectors in the batch. A code is "
            "rarely used if its use is below this fraction (0 to 1) of the mean use of all codes. "
            "With a smaller restart_threshold, the program needs more updates to find rarely used "
            "codes. With 0, no code is replaced."
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
            "Number of iterations of k-means. At the start of training, k-means computes the "
            "initial codes from the encoder's vectors of training images. With 0, the initial "
            "codes are random."
        ),
    )

    @model_validator(mode="after")
    def _check_codebook(self) -> "LearnedCodebookConfig":
        default = type(self).model_fields["codebook_weight"].default
        if self.codebook_decay is not None and self.codebook_weight != default:
            raise ValueError(
                f"codebook_weight {self.codebook_weight:g} has no effect with codebook_decay "
                f"{self.codebook_decay:g}, because codes that are moving averages have no codebook "
                "loss. Leave one of the two options out."
            )
        return self

    @property
    def starts_by_kmeans(self) -> bool:
        """Whether a new run sets the initial codes by k-means on features of training images."""
        return self.kmeans_iterations > 0

    @property
    def why_no_linear_start(self) -> str:
        # The linear start fits the decoder to the initial codes, so the codes must not be random.
        return "" if self.starts_by_kmeans else "its codes are random. Give --kmeans_iterations 10."

    @property
    def whitened_start(self) -> bool:
        # Without whitening, the code nearest to a vector also gives the nearest pixels.
        return False
