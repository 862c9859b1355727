"""The trainable tokenizer: VQGAN's network with any quantiser of `latentvae.bottlenecks`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from diffusers import AutoencoderKL, VQModel
from pydantic import Field
from torch import Tensor

from latentvae.errors import UserError
from latentvae.models.conv.conv_config import ENCODER, AttentionConfig
from latentvae.models.conv.discrete_autoencoder import DiscreteAutoencoder
from latentvae.models.conv.discretise import from_autoencoder_kl
from latentvae.models.conv.stock_vq import (
    from_vq_model,
    scale_features,
    to_vq_model,
    why_no_vq_model,
)
from latentvae.models.family import LatentShape
from latentvae.models.network import Network
from latentvae.models.tokenizer_family import TokenizerConfig, TokenizerFamily
from latentvae.option_marks import OfTheRun, Positive, UpdatesOrShare


class VQModelConfig(AttentionConfig, TokenizerConfig):
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
    quantizer_warmup_steps: Annotated[UpdatesOrShare, OfTheRun()] = Field(
        default=0,
        description=(
            "Number of updates at the start in which only the new quantiser and the 1x1 "
            "convolutions before and after the quantiser learn. After the warm-up, the decoder "
            "learns too. The warm-up is only for a training that starts from a KL autoencoder (see "
            "pretrained_model_name_or_path). Set quantizer_warmup_steps if the quality of the "
            "images falls in the first updates. A value between 0 and 1 is a fraction of the whole "
            "training (max_train_steps). If quantizer_warmup_steps equals max_train_steps, the "
            "decoder never learns."
        ),
    )
    train_encoder: Annotated[bool, OfTheRun()] = Field(
        default=False,
        description=(
            "Also train the encoder, if pretrained_model_name_or_path is a KL autoencoder. With "
            "train_encoder, the encoder starts to learn in the same update as the decoder. By "
            "default, the encoder keeps the weights of the KL autoencoder."
        ),
    )


def build_discrete(*, image_channels: int = 3, **options: Any) -> DiscreteAutoencoder:
    """Return a freshly initialised `DiscreteAutoencoder` with `options` as its arguments."""
    channels = {"in_channels": image_channels, "out_channels": image_channels}
    return DiscreteAutoencoder(**channels, **options)


class VQFamily(TokenizerFamily):
    """Methods for `DiscreteAutoencoder`, which is exported as a `VQModel` if possible."""

    network = DiscreteAutoencoder
    options = VQModelConfig

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
                    "returns images instead of parameters of a likelihood. Leave likelihood out."
                )
            return from_autoencoder_kl(net, options["quantizer"])
        return from_vq_model(net) if isinstance(net, VQModel) else super().adapt(net, options)

    def latent_shape(self, net: Network) -> LatentShape:
        f = 2 ** (len(net.config["block_out_channels"]) - 1)
        return LatentShape(f, self.quantizers(net)[0].in_channels)

    def why_not_stock(self, options: Mapping[str, Any]) -> str:
        return why_no_vq_model(options["quantizer"], options["likelihood"])

    def to_stock(self, net: Network, *, unit_range: bool = False) -> VQModel:
        module: Any = net
        return to_vq_model(module, unit_range=unit_range)

    def fit_stock(self, net: Network, stock: Network, images: Tensor) -> float:
        return scale_features(net, stock, images)
