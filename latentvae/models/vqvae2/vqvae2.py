"""Options and training wrapper of VQ-VAE-2, and the methods that latentvae calls for it."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from latentvae.bottlenecks import Quantizer
from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.bottlenecks.vector import VectorConfig
from latentvae.models.family import Codes, LatentShape, Usage
from latentvae.models.levels import join_levels
from latentvae.models.model_config import ModelConfig, Widths
from latentvae.models.network import Computation, Network
from latentvae.models.trainable import DiscreteFamily
from latentvae.models.vqvae2.network import VQVAE2
from latentvae.models.wrapper import TrainingWrapper
from latentvae.option_marks import Positive
from latentvae.outputs import AutoencoderOutput, Latent


class VQVAE2Config(ModelConfig):
    """Options of VQ-VAE-2, a network with a map of codes for each of several resolutions (levels).

    The downsampling factor f of the coarsest level is 2 ** (length of `block_out_channels`).
    """

    architecture: Literal["vqvae2"] = "vqvae2"
    block_out_channels: Widths = Field(
        default=(64, 128, 128),
        description=(
            "Number of channels of each level of the network, from fine to coarse. The first level "
            "has half of the image's resolution, and each further level halves the resolution "
            "again. Only the last levels (the coarsest ones) have codes (see code_levels)."
        ),
    )
    code_levels: Positive = Field(
        default=2,
        description=(
            "Number of levels with codes, from the coarsest level on. Each further level has twice "
            "the resolution of the level before it. Each level with codes has its own codebook of "
            "num_codes codes. With 1 level, the network is a VQ-VAE."
        ),
    )
    layers_per_block: Positive = Field(
        default=2,
        description=(
            "Number of residual blocks per level of the encoder. The decoder has the same number "
            "of residual blocks, at its lowest resolution only."
        ),
    )
    residual_channels: Positive = Field(
        default=64,
        description="Number of channels between the two convolutions of a residual block.",
    )
    latent_channels: Positive = Field(
        default=128,
        description=(
            "Number of channels of the decoder's input. This input combines the codes of all "
            "levels."
        ),
    )
    quantizer: VectorConfig = VectorConfig(num_codes=512, code_channels=64, codebook_decay=0.99)

    @model_validator(mode="after")
    def _check_code_levels(self) -> "VQVAE2Config":
        if self.code_levels > len(self.block_out_channels):
            raise ValueError(
                f"code_levels {self.code_levels} is more than the number of the network's levels, "
                f"which is {len(self.block_out_channels)} (the length of block_out_channels)"
            )
        return self

    @property
    def bottleneck(self) -> BottleneckConfig:
        return self.quantizer

    @property
    def has_codes(self) -> bool:
        return True

    @property
    def f(self) -> int:
        return 2 ** len(self.block_out_channels)

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"quantizer": self.quantizer.arguments()}


class VQVAE2TrainingWrapper(TrainingWrapper):
    """Training wrapper whose output has one latent for each level, coarsest first."""

    def forward(
        self, images: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> AutoencoderOutput:
        z = self.net.encode(images).latents
        features, found = self.net.quantize_levels(z, temperature=temperature)
        return AutoencoderOutput(
            recon=self.net.decode_codes([level.z for level in found]),
            latents=tuple(
                Latent(
                    z=level.z,
                    indices=level.indices,
                    features=own,
                    losses=level.losses,
                    statistics=level.statistics,
                )
                for own, level in zip(features, found, strict=True)
            ),
            output_logvar=self.output_logvar,
        )


class VQVAE2Family(DiscreteFamily):
    """Methods for `VQVAE2`.

    The latent z of `VQVAE2` holds the features of all levels before quantisation. The features of a
    level do not yet include the input from the codes of coarser levels. The methods `tokenize` and
    `decode` add the input from coarser levels.
    """

    network = VQVAE2
    options = VQVAE2Config
    wrapper = VQVAE2TrainingWrapper
    why_no_checkpointing = "does not exist for VQ-VAE-2, whose blocks need little memory"

    def build(self, *, image_channels: int = 3, sample_size: int = 256, **options: Any) -> VQVAE2:
        channels = {"in_channels": image_channels, "out_channels": image_channels}
        return VQVAE2(**channels, sample_size=sample_size, **options)

    def options_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        names = set(VQVAE2Config().shape())
        return {name: config[name] for name in config if name in names}

    def merge_options(
        self, options: Mapping[str, Any], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the options of a training run, with the network's shape from a pretrained network.

        The run's options, not the pretrained network, decide how the codes are trained.
        """
        own = self.options_of(config)
        shape = VectorConfig().shape_of(own["quantizer"])
        return {**options, **own, "quantizer": options["quantizer"] | shape}

    def apply_options(self, net: Network, options: ModelConfig) -> None:
        module: Any = net
        module.requantize(options.bottleneck.arguments())

    def latent_shape(self, net: Network) -> LatentShape:
        codes = self.codes(net)
        f = 2 ** len(net.config["block_out_channels"])
        return LatentShape(f, codes.levels * codes.channels)

    def side_multiple(self, net: Network) -> int:
        return self.latent_shape(net).f

    def latent_side(self, net: Network) -> Any:
        module: Any = net
        return iter((module.encoder, module.quant_conv, module.condition, module.quantize))

    def latent_head(self, net: Network) -> Any:
        module: Any = net
        return module.fold

    def quantizers(self, net: Network) -> tuple[Quantizer, ...]:
        module: Any = net
        return tuple(module.quantize)

    def features(self, net: Network, images: Tensor) -> tuple[Tensor, ...]:
        module: Any = net
        return tuple(module.quantize_levels(module.encode(images).latents)[0])

    def codes(self, net: Network) -> Codes:
        levels, (first, *_) = net.config["code_levels"], self.quantizers(net)
        return Codes(
            first.kind,
            number=first.num_codes,
            levels=sum(4**i for i in range(levels)),
            codebooks=levels,
            channels=first.code_channels,
            maps=levels,
        )

    @torch.no_grad()
    def tokenize(self, net: Network, z: Tensor) -> Tensor:
        module: Any = net
        return join_levels([level.indices for level in module.quantize_levels(z)[1]])

    @torch.no_grad()
    def decode_indices(
        self, net: Network, indices: Tensor, *, computation: Computation | None = None
    ) -> Tensor:
        module: Any = net
        return module.decode_indices(indices).sample

    def decode_without_search(self, net: Network, indices: Tensor) -> Tensor:
        return self.decode_indices(net, indices)

    def usage(self, net: Network) -> Usage:
        return Usage(
            package="latentvae.models",
            snippet=f"""\
# images (B, {{channels}}, H, W){{kind}} in [-1, 1], H and W multiples of {self.side_multiple(net)}
indices = vae.tokenize(images).indices
maps = vae.maps(indices)  # codes of each level, coarsest first
recon = vae.decode_indices(indices).sample""",
        )
