"""The trainable tokenizer: VQGAN's network with any quantiser of `latentvae.bottlenecks`.

`B` batch, `C` image channels, `h w` latent positions, `K` codes, `L` levels.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoencoderKL, VQModel
from pydantic import Field
from torch import Tensor

from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.bottlenecks.table import QUANTIZERS, AnyQuantizerConfig
from latentvae.bottlenecks.vector import VectorConfig
from latentvae.errors import UserError
from latentvae.likelihoods import LogitLaplace
from latentvae.models.conv.conv_config import ENCODER, AttentionConfig
from latentvae.models.conv.discrete_autoencoder import DiscreteAutoencoder
from latentvae.models.conv.discretise import from_autoencoder_kl
from latentvae.models.conv.stock_vq import (
    from_vq_model,
    scale_features,
    to_vq_model,
    why_no_vq_model,
)
from latentvae.models.family import Codes, LatentShape, Usage
from latentvae.models.model_config import ModelConfig
from latentvae.models.network import Computation, Network
from latentvae.models.trainable import DiscreteFamily
from latentvae.models.wrapper import TrainingWrapper
from latentvae.option_marks import OfTheRun, Positive, UpdatesOrShare
from latentvae.outputs import AutoencoderOutput, Latent


class VQModelConfig(AttentionConfig):
    """Options of the network: VQGAN with a quantiser of your choice.

    The downsampling factor f is 2 ** (number of levels - 1).
    """

    architecture: Literal["vq"] = "vq"
    latent_channels: Positive = Field(
        default=256,
        description=(
            "Number of channels of the encoder's output, before a projection to the channels of "
            "the quantiser."
        ),
    )
    likelihood: Literal["logit_laplace"] | None = Field(
        default=None,
        description=(
            "Likelihood of the pixels. `logit_laplace` is the likelihood of DALL-E's dVAE. The "
            "decoder then returns the parameters of this likelihood, and the negative "
            "log-likelihood replaces rec_loss."
        ),
    )
    quantizer_warmup_steps: Annotated[UpdatesOrShare, OfTheRun()] = Field(
        default=0,
        description=(
            "Number of first updates in which only the new quantiser and the 1x1 convolutions "
            "beside it learn, when pretrained_model_name_or_path is a KL autoencoder. After these "
            "updates, the decoder learns too. A value below 1 is a share of max_train_steps. With "
            "max_train_steps, the decoder never learns."
        ),
    )
    train_encoder: Annotated[bool, OfTheRun()] = Field(
        default=False,
        description=(
            "Also train the encoder, from the same update as the decoder, when "
            "pretrained_model_name_or_path is a KL autoencoder. By default, the encoder keeps the "
            "weights of the KL autoencoder."
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
        return self.has_kl  # Gumbel-softmax

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"quantizer": self.quantizer.arguments()}


def build_discrete(*, image_channels: int = 3, **options: Any) -> DiscreteAutoencoder:
    """Return a freshly initialised tokenizer with `options` as arguments of its class."""
    channels = {"in_channels": image_channels, "out_channels": image_channels}
    return DiscreteAutoencoder(**channels, **options)


class DiscreteTrainingWrapper(TrainingWrapper):
    """Training wrapper that encodes, quantises and decodes images.

    Its output has all values that the objective and the update of the codebook need.
    """

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last layer that learns, see `TrainingWrapper.last_layer`."""
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


class VQFamily(DiscreteFamily):
    """Family of `DiscreteAutoencoder`, exported as a `VQModel` with the same codes if possible."""

    network = DiscreteAutoencoder
    options = VQModelConfig
    wrapper = DiscreteTrainingWrapper

    @property
    def exports(self) -> tuple[type[Any], ...]:
        return (VQModel, DiscreteAutoencoder)

    def build(self, **options: Any) -> DiscreteAutoencoder:
        return build_discrete(**options)

    def options_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        names = (*ENCODER, "mid_block_add_attention", "attention_levels", "likelihood", "quantizer")
        return {name: config[name] for name in names}

    def adapt(self, net: Network, options: Mapping[str, Any]) -> Any | None:
        if isinstance(net, AutoencoderKL):
            if (likelihood := options["likelihood"]) is not None:
                raise UserError(
                    f"likelihood {likelihood} cannot discretise a KL autoencoder, whose decoder "
                    "makes images. Leave likelihood out."
                )
            return from_autoencoder_kl(net, options["quantizer"])
        return from_vq_model(net) if isinstance(net, VQModel) else super().adapt(net, options)

    def merge_options(
        self, options: Mapping[str, Any], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the run's options with the pretrained network's shape.

        If run and network have a quantiser of the same type, the run's options decide how the
        quantiser learns.
        """
        own = self.options_of(config)
        same = options["quantizer"]["type"] == own["quantizer"]["type"]
        shape = QUANTIZERS[own["quantizer"]["type"]].config().shape_of(own["quantizer"])
        own["quantizer"] = (options["quantizer"] if same else {}) | shape
        return {**options, **own}

    def apply_options(self, net: Network, options: ModelConfig) -> None:
        module: Any = net
        module.requantize(options.bottleneck.arguments())

    def latent_shape(self, net: Network) -> LatentShape:
        f = 2 ** (len(net.config["block_out_channels"]) - 1)
        return LatentShape(f, self.quantizer(net).in_channels)

    def likelihood(self, net: Network) -> LogitLaplace | None:
        module: Any = net
        return module.likelihood

    def codes(self, net: Network) -> Codes:
        quantizer, kind = self.quantizer(net), net.config["quantizer"]["type"]
        return Codes(
            kind,
            number=quantizer.num_codes,
            levels=quantizer.num_levels,
            codebooks=quantizer.num_codebooks,
            channels=quantizer.code_channels,
        )

    @torch.no_grad()
    def tokenize(self, net: Network, z: Tensor) -> Tensor:
        return self.quantizer(net)(z).indices

    @torch.no_grad()
    def decode_indices(
        self, net: Network, indices: Tensor, *, computation: Computation | None = None
    ) -> Tensor:
        module: Any = net
        if computation is None:
            return module.decode_indices(indices).sample
        codes = self.quantizer(net).codes(indices)
        return computation.decode(net, codes, force_not_quantize=True).sample

    def decode_without_search(self, net: Network, indices: Tensor) -> Tensor:
        return self.decode_indices(net, indices)

    def why_not_stock(self, options: Mapping[str, Any]) -> str:
        return why_no_vq_model(options["quantizer"], options["likelihood"])

    def to_stock(self, net: Network, *, unit_range: bool = False) -> VQModel:
        module: Any = net
        return to_vq_model(module, unit_range=unit_range)

    def fit_stock(self, net: Network, stock: Network, images: Tensor) -> float:
        return scale_features(net, stock, images)

    def usage(self, net: Network) -> Usage:
        return Usage(
            package="latentvae.models",
            snippet="""\
indices = vae.tokenize(images).indices  # images (B, {channels}, H, W){kind} in [-1, 1]
recon = vae.decode_indices(indices).sample""",
        )
