"""Options, training wrapper and methods that all networks with a Gaussian posterior share."""

import math
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from latentvae.bottlenecks import BOTTLENECKS
from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.bottlenecks.flow import FlowConfig
from latentvae.bottlenecks.gaussian import GaussianBottleneck, GaussianConfig, Logvar
from latentvae.models.model_config import ModelConfig
from latentvae.models.network import Network
from latentvae.models.trainable import TrainableFamily
from latentvae.models.wrapper import TrainingWrapper
from latentvae.option_marks import Count, OfTheRun, Positive
from latentvae.outputs import AutoencoderOutput, Latent


class PosteriorConfig(ModelConfig):
    """Options of a network with a Gaussian posterior: the posterior's variance, and the prior."""

    posterior_logvar: Annotated[Logvar | None, OfTheRun()] = Field(
        default=None,
        description=(
            "Log-variance of every posterior, such as -1.386 for a standard deviation of 0.5. With "
            "posterior_logvar, the encoder predicts only the mean, and the exported model also "
            "samples with the fixed variance. By default, the encoder predicts the variance too."
        ),
    )
    posterior_flow: Annotated[Count, OfTheRun()] = Field(
        default=0,
        description=(
            "Number of coupling layers of a normalising flow, such as 8. The flow is a learned "
            "prior for the KL loss (Flow-VAE), in place of the standard normal prior. At the same "
            "reconstruction error, the KL is smaller with the flow than with the standard normal "
            "prior. The exported model does not contain the flow. With posterior_flow 0, there is "
            "no flow."
        ),
    )
    posterior_flow_channels: Annotated[Positive, OfTheRun()] = Field(
        default=64,
        description=(
            "Number of hidden channels of each coupling layer of the flow (see posterior_flow)."
        ),
    )

    @property
    def bottleneck(self) -> BottleneckConfig:
        shape: Any = {
            "latent_channels": self.latent_channels,
            "posterior_logvar": self.posterior_logvar,
        }
        if not self.posterior_flow:
            return GaussianConfig(**shape)
        return FlowConfig(**shape, layers=self.posterior_flow, width=self.posterior_flow_channels)

    @property
    def posterior(self) -> Literal["gaussian"]:
        return "gaussian"

    @property
    def draws_noise(self) -> bool:
        return self.posterior_flow > 0 or super().draws_noise  # a flow's KL needs samples

    @property
    def kl_floor(self) -> float:
        """Smallest KL that the posteriors can have, in nats per latent element."""
        if self.posterior_logvar is None or self.posterior_flow:
            return 0.0
        return 0.5 * (math.exp(self.posterior_logvar) - 1.0 - self.posterior_logvar)

    @model_validator(mode="after")
    def _check_posterior(self) -> "PosteriorConfig":
        default = PosteriorConfig.model_fields["posterior_flow_channels"].default
        if not self.posterior_flow and self.posterior_flow_channels != default:
            raise ValueError(
                f"posterior_flow_channels {self.posterior_flow_channels} has no effect while "
                "posterior_flow is 0. Set posterior_flow too, for example 8, or leave "
                "posterior_flow_channels out."
            )
        given = {"posterior_logvar": self.posterior_logvar, "posterior_flow": self.posterior_flow}
        for name, value in given.items():
            if self.freeze_encoder and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {value:g} and freeze_encoder exclude each other: the posterior of a "
                    "frozen encoder does not change. Leave one of the two options out."
                )
        return self


class KLTrainingWrapper(TrainingWrapper):
    """Training wrapper that encodes, samples the posterior or takes its mode, and decodes.

    Args:
        net: the autoencoder.
        output_logvar: see `TrainingWrapper`.
        learn_logvar: see `TrainingWrapper`.
        bottleneck: module that samples the posterior and computes its KL. The default computes the
            KL to the prior N(0, I).
    """

    def __init__(
        self,
        net: Any,
        *,
        output_logvar: float = 0.0,
        learn_logvar: bool = False,
        bottleneck: GaussianBottleneck | None = None,
    ) -> None:
        super().__init__(net, output_logvar=output_logvar, learn_logvar=learn_logvar)
        default = GaussianBottleneck(latent_channels=net.config["latent_channels"])
        self.bottleneck = default if bottleneck is None else bottleneck

    def forward(
        self, images: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> AutoencoderOutput:
        moments = self.net.encode(images).latent_dist.parameters
        found = self.bottleneck(moments, sample=sample, temperature=temperature)
        latent = Latent(
            z=found.z, kl=found.kl, kl_per_channel=found.kl_per_channel, mean=found.mean
        )
        return AutoencoderOutput(
            recon=self.decode(latent.z, images),
            latents=(latent,),
            output_logvar=self.output_logvar,
        )

    def decode(self, z: Tensor, images: Tensor) -> Tensor:
        return self.net.decode(z).sample

    def averaged(self) -> nn.Module:
        return nn.ModuleList([self.net, self.bottleneck])


class PosteriorFamily(TrainableFamily):
    """Methods for networks with a Gaussian posterior."""

    has_posterior = True
    wrapper = KLTrainingWrapper

    def wrap(
        self,
        net: Any,
        options: ModelConfig,
        *,
        output_logvar: float = 0.0,
        learn_logvar: bool = False,
    ) -> TrainingWrapper:
        config, wrapper = options.bottleneck, cast("type[KLTrainingWrapper]", self.wrapper)
        return wrapper(
            net,
            output_logvar=output_logvar,
            learn_logvar=learn_logvar,
            bottleneck=BOTTLENECKS[config.type].build(config.arguments()),
        )

    @torch.no_grad()
    def write_constants(self, net: Network, options: ModelConfig) -> None:
        """Write a fixed log-variance into the layer that computes the mean and the log-variance.

        The mean that the layer computes does not change. If the variance is fixed, training ignores
        the log-variance that the layer computes. Without this method, the trained layer could
        therefore return any log-variance.
        """
        logvar = getattr(options, "posterior_logvar", None)
        if logvar is None:
            return
        last: Any = self.latent_head(net)
        last = getattr(last, "conv_out", last)  # an encoder's last layer, without quant_conv
        half = len(last.weight) // 2
        last.weight[half:] = 0.0
        last.bias[half:] = logvar
