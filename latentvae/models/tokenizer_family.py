"""Options, training wrapper and methods that all kinds of `models.tokenizer.Tokenizer` share."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.bottlenecks.table import QUANTIZERS, AnyQuantizerConfig
from latentvae.bottlenecks.vector import VectorConfig
from latentvae.likelihoods import LogitLaplace
from latentvae.models.family import Codes, Usage
from latentvae.models.model_config import ModelConfig
from latentvae.models.network import Computation, Network
from latentvae.models.trainable import DiscreteFamily
from latentvae.models.wrapper import TrainingWrapper
from latentvae.outputs import AutoencoderOutput, Latent


class TokenizerConfig(ModelConfig):
    """Options of every tokenizer: its quantiser, and a likelihood of pixels."""

    likelihood: Literal["logit_laplace"] | None = Field(
        default=None,
        description=(
            "Likelihood of the pixels. `logit_laplace` is the likelihood of DALL-E's dVAE. With "
            "`logit_laplace`, the decoder returns the parameters of this distribution, and the "
            "negative log-likelihood replaces the pixel loss (rec_loss). By default, the decoder "
            "returns pixels."
        ),
    )
    quantizer: AnyQuantizerConfig = VectorConfig()

    @property
    def kind(self) -> str:
        return f"{self.architecture} ({self.quantizer.type})"

    @property
    def posterior(self) -> Literal["categorical"] | None:
        return "categorical" if self.has_kl else None

    @property
    def kl_channels(self) -> int:
        return 1

    @property
    def bottleneck(self) -> BottleneckConfig:
        return self.quantizer

    @property
    def has_codes(self) -> bool:
        return True

    @property
    def pixel_likelihood(self) -> str | None:
        return self.likelihood

    @property
    def draws_noise(self) -> bool:
        return self.has_kl  # only Gumbel-softmax has a KL, and it draws noise

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"quantizer": self.quantizer.arguments()}


class DiscreteTrainingWrapper(TrainingWrapper):
    """Training wrapper that encodes, quantises and decodes images.

    The wrapper's output has all values that the loss and the update of the codebook need.
    """

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last trained layer, see `TrainingWrapper.last_layer`."""
        weight = super().last_layer
        return weight if weight.requires_grad else self.net.post_quant_conv.weight

    def forward(
        self, images: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> AutoencoderOutput:
        # Features and their codes
        features = self.net.encode(images).latents
        quantized = self.net.quantize(features, temperature=temperature)

        # Convert the quantiser's KL from a mean in nats per token to a sum for each image
        losses = dict(quantized.losses)
        kl = losses.pop("kl", None)
        tokens = quantized.indices[0].numel()
        kl_per_channel = None if kl is None else (kl * tokens).expand(len(images), 1)

        latent = Latent(
            z=quantized.z,
            kl=None if kl_per_channel is None else kl_per_channel.sum(dim=1),
            kl_per_channel=kl_per_channel,
            indices=quantized.indices,
            features=features,
            losses=losses,
            statistics=quantized.statistics,
        )
        return AutoencoderOutput(
            recon=self.net.decode_parameters(quantized.z),
            latents=(latent,),
            output_logvar=self.output_logvar,
        )


class TokenizerFamily(DiscreteFamily):
    """Methods that all subclasses of `Tokenizer` share.

    Each subclass of `TokenizerFamily` builds networks of one subclass of `Tokenizer`.
    """

    wrapper = DiscreteTrainingWrapper

    def merge_options(
        self, options: Mapping[str, Any], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the options of a training run, with the values that a pretrained network decides.

        If the run's options and the pretrained network have a quantiser of the same type, the run's
        options decide how the quantiser learns. Otherwise, the default options of the pretrained
        quantiser's type decide.
        """
        own = self.options_of(config)
        same = options["quantizer"]["type"] == own["quantizer"]["type"]
        shape = QUANTIZERS[own["quantizer"]["type"]].config().shape_of(own["quantizer"])
        own["quantizer"] = (options["quantizer"] if same else {}) | shape
        return {**options, **own}

    def apply_options(self, net: Network, options: ModelConfig) -> None:
        module: Any = net
        module.requantize(options.bottleneck.arguments())

    def likelihood(self, net: Network) -> LogitLaplace | None:
        module: Any = net
        return module.likelihood

    def codes(self, net: Network) -> Codes:
        (quantizer,), kind = self.quantizers(net), net.config["quantizer"]["type"]
        return Codes(
            kind,
            number=quantizer.num_codes,
            levels=quantizer.num_levels,
            codebooks=quantizer.num_codebooks,
            channels=quantizer.code_channels,
        )

    @torch.no_grad()
    def tokenize(self, net: Network, z: Tensor) -> Tensor:
        return self.quantizers(net)[0](z).indices

    @torch.no_grad()
    def decode_indices(
        self, net: Network, indices: Tensor, *, computation: Computation | None = None
    ) -> Tensor:
        module: Any = net
        if computation is None:
            return module.decode_indices(indices).sample
        codes = self.quantizers(net)[0].codes(indices)
        return computation.decode(net, codes, force_not_quantize=True).sample

    def decode_without_search(self, net: Network, indices: Tensor) -> Tensor:
        return self.decode_indices(net, indices)

    def usage(self, net: Network) -> Usage:
        return Usage(
            package="latentvae.models",
            snippet="""\
indices = vae.tokenize(images).indices  # images (B, {channels}, H, W){kind} in [-1, 1]
recon = vae.decode_indices(indices).sample""",
        )
