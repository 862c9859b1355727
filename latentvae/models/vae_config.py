"""Options that all networks with a likelihood have."""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar

from pydantic import Field

from latentvae.likelihoods.table import LikelihoodName
from latentvae.models.bound import LikelihoodNet
from latentvae.option_marks import ChosenByPreset, Elsewhere, Section


class VAEConfig(Section):
    """Base class of the options of a network with a likelihood.

    A subclass has an option `architecture`, whose only value is the name of the kind of network.
    """

    can_checkpoint: ClassVar[bool] = False  # whether the network has gradient checkpointing
    has_convolutions: ClassVar[bool] = True
    has_classes: ClassVar[bool] = False  # whether the network learns the classes of the images

    architecture: Annotated[Any, ChosenByPreset(), Elsewhere("arch model_type")]
    likelihood: Annotated[LikelihoodName, Elsewhere("decoder_distribution")] = Field(
        default="bernoulli",
        description=(
            "Distribution of the pixels. `bernoulli` is for binary images, and all other "
            "distributions are for 8-bit pixels. With `gaussian`, `logit_laplace` and "
            "`discretized_logistic`, the decoder predicts a location and a scale for each pixel "
            "and channel. `logistic_mixture` is a mixture of 10 logistics in which the channels of "
            "a pixel depend on each other."
        ),
    )

    @property
    def has_batch_norm(self) -> bool:
        """Whether the network has batch norm, whose statistics all processes must share."""
        return False

    @abstractmethod
    def build(self, image_shape: tuple[int, int, int]) -> LikelihoodNet:
        """Return a new network for images of shape (C, H, W)."""

    def why_no_single_gaussian(self) -> str:
        """Say what must change so that the posterior is a single Gaussian vector.

        Return "" if the posterior already is a single Gaussian vector.
        """
        return ""
