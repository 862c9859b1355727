"""Define the methods of trainable networks: build, wrap, fine-tune, freeze and export.

A new kind of network needs a folder with its options, network, training wrapper and subclass of
`TrainableFamily`, and a line in `models.table`.

`B` batch, `C` image channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from latentvae.bottlenecks import Quantizer
from latentvae.models.family import Codes, Family
from latentvae.models.matrices import muon_matrices
from latentvae.models.model_config import ModelConfig
from latentvae.models.network import Computation, Network
from latentvae.models.wrapper import TrainingWrapper

PROFILES = ("sd", "sd3", "sdxl")  # groups of pipelines, which read scale and shift differently


class TrainableFamily(Family, ABC):
    """A kind of network that latentvae can train.

    Attributes:
        network: class of the network.
        options: class of the network's options in the config of a training run. The option
            `architecture` names this kind of network.
        wrapper: class of the module that wraps the network in training.
        profiles: groups of pipelines for which the network can be exported, see `PROFILES`.
        why_no_checkpointing: a clause that says why the network has no gradient checkpointing, or
            "" if the network has it.
    """

    network: ClassVar[type[Any]]
    options: ClassVar[type[ModelConfig]]
    wrapper: ClassVar[type[TrainingWrapper]]
    profiles: ClassVar[tuple[str, ...]] = ("sd",)
    why_no_checkpointing: ClassVar[str] = ""

    @property
    def exports(self) -> tuple[type[Any], ...]:
        """Classes that an exported network of this kind can have."""
        return (self.network,)

    # A new network, or a pretrained one.

    @abstractmethod
    def build(self, *, image_channels: int = 3, sample_size: int = 256, **options: Any) -> Any:
        """Return a freshly initialised network.

        Args:
            image_channels: number of image channels C.
            sample_size: side of the training images in pixels. diffusers uses this number as the
                tile size.
            options: the result of `self.options(...).shape()`.
        """

    @abstractmethod
    def options_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options whose values follow from the config of a pretrained network."""

    def adapt(self, net: Network, options: Mapping[str, Any]) -> Any | None:
        """Convert a pretrained network to this kind, or return None if this is impossible.

        Args:
            net: the pretrained network.
            options: options of `build`, for modules that the pretrained network does not have.
        """
        return net if type(net) is self.network else None

    def merge_options(
        self, options: Mapping[str, Any], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the options of a training run, with the values that a pretrained network decides.

        Args:
            options: options of the network in the config of the training run.
            config: config of the pretrained network.
        """
        return {**options, **self.options_of(config)}

    def apply_options(self, net: Network, options: ModelConfig) -> None:
        """Set those options of the training run that the network's own config does not decide."""

    def wrap(
        self,
        net: Any,
        options: ModelConfig,
        *,
        output_logvar: float = 0.0,
        learn_logvar: bool = False,
    ) -> TrainingWrapper:
        """Return the training wrapper of a network.

        Args:
            net: the network, which the wrapper contains.
            options: options of the network in the config of the training run.
            output_logvar, learn_logvar: see `TrainingWrapper`.
        """
        return self.wrapper(net, output_logvar=output_logvar, learn_logvar=learn_logvar)

    def write_constants(self, net: Network, options: ModelConfig) -> None:
        """Write constants from the options into the network's weights, such as a fixed variance."""

    def matrices(self, net: Network) -> list[nn.Parameter]:
        """Return the weights of convolutions and linear layers that the optimiser Muon may train.

        The first and the last layer of the network are left out, because Muon is made for layers
        inside a network. The 1x1 convolutions before and after the latent are left out too, and so
        are the layers of a quantiser.
        """
        module: Any = net
        outer = ("encoder.conv_in", "decoder.conv_out", "quant_conv", "post_quant_conv", "quantize")
        return muon_matrices(module, outer=outer)

    # Export.

    def why_not_stock(self, options: Mapping[str, Any]) -> str:
        """Return a clause that says why no class of diffusers can replace the network.

        Return "" if a class of diffusers can replace it.

        Args:
            options: options of the network, as in its config.
        """
        return ""


class DiscreteFamily(TrainableFamily):
    """Methods for a tokenizer, whose quantiser is `net.quantize`.

    A network with several latents overrides `quantizers` and `features`.

    If a class of diffusers computes the same codes for all images, the tokenizer is exported as
    this class of diffusers, and otherwise as its own class.
    """

    has_posterior = False

    def freeze_encoder(self, net: Network) -> None:
        super().freeze_encoder(net)
        for quantizer in self.quantizers(net):
            quantizer.eval()  # in train mode, a codebook of moving averages would still change

    def quantizers(self, net: Network) -> tuple[Quantizer, ...]:
        module: Any = net
        return (module.quantize,)

    def features(self, net: Network, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features that each quantiser reads, with c channels: (B, c, h, w)."""
        return (net.encode(images).latents,)

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
        """Convert a tokenizer to a class of diffusers.

        This is possible only if `why_not_stock` returns "" for the tokenizer's config.

        Args:
            net: the tokenizer, in float32 on the CPU.
            unit_range: use pixels in [0, 1] for input and output, and look codes up by index, as
                aMUSEd does.
        """
        raise NotImplementedError(self.why_not_stock(net.config))  # callers check this first

    def fit_stock(self, net: Network, stock: Network, images: Tensor) -> float:
        """Scale the features of `stock` so that its search for the nearest code is precise enough.

        Args:
            net: the trained network.
            stock: the same network, converted to a class of diffusers.
            images: (B, C, H, W) in [-1, 1], to measure the features' lengths.

        Returns:
            The factor by which the features were multiplied, a power of two.
        """
        return 1.0
