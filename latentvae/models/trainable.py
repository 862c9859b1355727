"""The contract of networks that can be trained: built, wrapped, fine-tuned, frozen, exported.

A new kind is a folder with its options, network, training wrapper and a family, and a line in
`models.table`. `B` batch, `C` image channels, `d` latent channels, `K` codes, `D` code width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from latentvae.bottlenecks import Quantizer
from latentvae.models.family import Codes, Family
from latentvae.models.model_config import ModelConfig
from latentvae.models.network import Computation, Network
from latentvae.models.wrapper import TrainingWrapper

PROFILES = ("sd", "sd3", "sdxl")  # readings of scale and shift that an export may be written for


class TrainableFamily(Family, ABC):
    """A kind of network that `train` takes.

    Attributes:
        network: its class.
        options: of the network in a run's config; they name the family as `architecture`.
        wrapper: what training prepares.
        profiles: of its exports.
        why_no_checkpointing: a clause on why gradient checkpointing is not there; empty if it is.
    """

    network: ClassVar[type[Any]]
    options: ClassVar[type[ModelConfig]]
    wrapper: ClassVar[type[TrainingWrapper]]
    profiles: ClassVar[tuple[str, ...]] = ("sd",)
    why_no_checkpointing: ClassVar[str] = ""

    @property
    def exports(self) -> tuple[type[Any], ...]:
        """Classes that an export of it may be of."""
        return (self.network,)

    # A new network, or a pretrained one.

    @abstractmethod
    def build(self, *, image_channels: int = 3, sample_size: int = 256, **options: Any) -> Any:
        """A freshly initialised network.

        Args:
            sample_size: side of the training images in pixels, by which diffusers tiles.
            options: as `self.options(...).shape()` gives them.
        """

    @abstractmethod
    def options_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Options, as far as a pretrained network's config decides them."""

    def adapt(self, net: Network, options: Mapping[str, Any]) -> Any | None:
        """A pretrained network as one of this family; None where it is another kind.

        Args:
            options: of `build`, for what the pretrained network does not have.
        """
        return net if type(net) is self.network else None

    def merge_options(
        self, options: Mapping[str, Any], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Options of a run with those that a pretrained network's config decides in their place."""
        return {**options, **self.options_of(config)}

    def apply_options(self, net: Network, options: ModelConfig) -> None:
        """Let a pretrained network learn as the run's options say, where its config does not."""

    # Export.

    def why_not_stock(self, options: Mapping[str, Any]) -> str:
        """Why no class of diffusers can be the same network, as a clause; empty if one can.

        Args:
            options: of the network, as in its config.
        """
        return ""


class DiscreteFamily(TrainableFamily):
    """A tokenizer, with its quantiser in `net.quantize`.

    Its export is of a stock class of diffusers where there is one that finds the same codes, and
    else of its own.
    """

    has_posterior = False

    def freeze_encoder(self, net: Network) -> None:
        super().freeze_encoder(net)
        module: Any = net
        module.quantize.eval()  # nor will a codebook of moving averages learn

    def quantizer(self, net: Network) -> Quantizer:
        module: Any = net
        return module.quantize

    @abstractmethod
    def codes(self, net: Network) -> Codes: ...

    @abstractmethod
    def tokenize(self, net: Network, z: Tensor) -> Tensor: ...

    @abstractmethod
    def decode_indices(
        self, net: Network, indices: Tensor, *, computation: Computation | None = None
    ) -> Tensor: ...

    def why_not_stock(self, options: Mapping[str, Any]) -> str:
        return f"diffusers has no class for a {self.network.__name__}"

    def to_stock(self, net: Network, *, unit_range: bool = False) -> Any:
        """The same tokenizer as a stock network, where `why_not_stock` has no reason against it.

        Args:
            net: float32, on the CPU.
            unit_range: of pixels in [0, 1], with codes looked up by index, as aMUSEd asks.
        """
        raise NotImplementedError(self.why_not_stock(net.config))  # callers ask that first

    def fit_stock(self, net: Network, stock: Network, images: Tensor) -> float:
        """Scale the features of `stock`, in place, so that its search tells codes apart; returns
        the factor, a power of two.

        Args:
            images: in [-1, 1], to measure on.
        """
        return 1.0
