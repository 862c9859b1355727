"""Options of networks whose latents are vectors."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from latentvae.models.dense.class_network import ClassVAE
from latentvae.models.dense.network import VectorVAE
from latentvae.models.dense.posterior_flows import FlowName
from latentvae.models.vae_config import VAEConfig
from latentvae.option_marks import Positive


class VectorVAEConfig(VAEConfig):
    """Options of a network whose latents are vectors."""

    latent_units: tuple[Positive, ...] = Field(
        default=(50,),
        description=(
            "Number of units of each latent vector, starting with the vector that is nearest to "
            "the image. With two numbers, the VAE has two layers of latents."
        ),
    )
    hidden_channels: tuple[Positive, ...] = Field(
        default=(200,),
        description=(
            "Width of the dense layers. The first number is for the layers between the image and "
            "the first latent vector. The second number is for the layers between the first and "
            "the second latent vector, and so on. There must be one number for each latent vector."
        ),
    )
    activation: Literal["tanh", "elu", "silu"] = Field(
        default="tanh", description="Activation function of the hidden layers."
    )
    posterior_flow: FlowName = Field(
        default="none",
        description=(
            "Normalising flow that makes the posterior more flexible than a Gaussian: planar "
            "(Rezende and Mohamed), realnvp, or iaf (inverse autoregressive flow). A flow needs a "
            "network with a single latent vector. With `none`, the posterior is a Gaussian."
        ),
    )
    flow_layers: Positive = Field(
        default=2, description="Number of layers of the posterior flow (see posterior_flow)."
    )
    flow_channels: Positive = Field(
        default=320,
        description=(
            "Width of the hidden layers in each flow layer, for the flows realnvp and iaf (see "
            "posterior_flow)."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "VectorVAEConfig":
        if len(self.latent_units) != len(self.hidden_channels):
            raise ValueError(
                f"hidden_channels must have as many numbers as latent_units (got "
                f"{len(self.hidden_channels)} and {len(self.latent_units)})."
            )
        if self.posterior_flow != "none" and len(self.latent_units) > 1:
            raise ValueError(
                f"posterior_flow {self.posterior_flow} needs a single latent vector (latent_units "
                f"gives {len(self.latent_units)} vectors)."
            )
        return self

    def why_no_single_gaussian(self) -> str:
        if len(self.latent_units) > 1:
            return "a single latent vector"
        return "" if self.posterior_flow == "none" else "posterior_flow none"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `VectorVAE`, except the shape of the images."""
        return self.model_dump(exclude={"architecture"})

    def build(self, image_shape: tuple[int, int, int]) -> VectorVAE:
        channels, height, width = image_shape
        return VectorVAE(
            image_channels=channels, image_height=height, image_width=width, **self.arguments()
        )


class DenseVAEConfig(VectorVAEConfig):
    """Options of the network: a VAE of dense layers, as in the first papers on VAEs."""

    has_convolutions: ClassVar[bool] = False

    architecture: Literal["dense"] = "dense"  # type: ignore[assignment]
    hidden_layers: Positive = Field(
        default=2,
        description=(
            "Number of dense layers between the image and the first latent vector, and between "
            "each latent vector and the next."
        ),
    )


class ConvVAEConfig(VectorVAEConfig):
    """Options of the network: a VAE of residual blocks with convolutions and one dense layer."""

    architecture: Literal["conv"] = "conv"  # type: ignore[assignment]
    hidden_channels: tuple[Positive, ...] = Field(
        default=(450,),
        description=(
            "Width of the dense layers. The first number is for the layers between the "
            "convolutions and the first latent vector. The second number is for the layers between "
            "the first and the second latent vector, and so on. There must be one number for each "
            "latent vector."
        ),
    )
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        default=(16, 32, 32),
        description=(
            "Number of channels of each residual block. Each block halves the height and width."
        ),
    )
    activation: Literal["tanh", "elu", "silu"] = Field(
        default="elu", description="Activation function of the hidden layers."
    )


class ClassVAEConfig(VAEConfig):
    """Options of the network: a VAE whose latent is a vector and a class (M2, arXiv:1406.5298)."""

    has_convolutions: ClassVar[bool] = False
    has_classes: ClassVar[bool] = True

    architecture: Literal["classes"] = "classes"  # type: ignore[assignment]
    num_classes: int = Field(
        default=0,
        ge=0,
        description="Number of classes. 0 means the number of classes of the training images.",
    )
    latent_units: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=1)] = Field(
        default=(50,), description="Number of units of the latent vector."
    )
    hidden_channels: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=1)] = Field(
        default=(500,), description="Width of the hidden dense layers."
    )
    hidden_layers: Positive = Field(
        default=1,
        description=(
            "Number of hidden dense layers in each of the three networks (classifier, encoder and "
            "decoder)."
        ),
    )
    activation: Literal["tanh", "elu", "silu"] = Field(
        default="silu", description="Activation function of the hidden layers."
    )

    def why_no_single_gaussian(self) -> str:
        return "architecture dense or conv"

    def build(self, image_shape: tuple[int, int, int]) -> ClassVAE:
        channels, height, width = image_shape
        return ClassVAE(
            image_channels=channels,
            image_height=height,
            image_width=width,
            num_classes=self.num_classes,
            latent_units=self.latent_units[0],
            hidden_units=self.hidden_channels[0],
            hidden_layers=self.hidden_layers,
            activation=self.activation,
            likelihood=self.likelihood,
        )
