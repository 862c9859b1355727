"""Options of the network: one class for each architecture, which the preset chooses."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from latentvae.bottlenecks.gaussian import GaussianConfig
from latentvae.bottlenecks.options import BottleneckConfig
from latentvae.bottlenecks.table import AnyQuantizerConfig
from latentvae.bottlenecks.vector import VectorConfig
from latentvae.options import (
    ChosenByPreset,
    Count,
    Elsewhere,
    OfTheRun,
    Positive,
    Section,
    marked,
    tag_in,
)

Widths = tuple[Positive, ...]


class ModelConfig(Section):
    """What all architectures have.

    Attributes:
        architecture: the name in a preset that chooses the class.
    """

    architecture: Annotated[Any, ChosenByPreset(), OfTheRun(), Elsewhere("arch model_type")]
    block_out_channels: Widths = Field(
        default=(128, 256, 512, 512),
        description=(
            "Width of each level, from full resolution down; f = 2 ** (number of levels - 1)."
        ),
    )
    latent_channels: Annotated[Positive, Elsewhere("z_channels")] = Field(
        default=4, description="Latent channels d: 4 serves the SD family, 16 SD3 and FLUX."
    )

    @property
    def has_kl(self) -> bool:
        """Whether its latent has a KL divergence to a prior."""
        return self.bottleneck.has_kl

    @property
    def bottleneck(self) -> BottleneckConfig:
        """Options of what turns encoder features into its latent; here none does."""
        return BottleneckConfig()

    @property
    def f(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    def shape(self) -> dict[str, Any]:
        """What the architecture's builder takes: all but what a fine-tuning starts from."""
        return self.model_dump(exclude=set(marked(type(self), OfTheRun)))

    def _check_levels(self, name: str, levels: tuple[int, ...]) -> None:
        for level in levels:
            if level >= len(self.block_out_channels):
                raise ValueError(
                    f"{name} names level {level}, but block_out_channels has levels 0 to "
                    f"{len(self.block_out_channels) - 1}"
                )

    def _check_length(self, name: str, values: tuple[int, ...]) -> None:
        if len(values) != len(self.block_out_channels):
            raise ValueError(
                f"{name} has {len(values)} levels, but block_out_channels has "
                f"{len(self.block_out_channels)}"
            )


class _Pretrained(Section):
    """What a fine-tuning starts from."""

    pretrained_model_name_or_path: Annotated[str | None, OfTheRun()] = Field(
        default=None,
        description=(
            "Fine-tune this network instead of starting from nothing: a diffusers folder, a "
            "single .safetensors file, or a Hub id (owner/name/folder). Its own shape counts."
        ),
    )
    freeze_encoder: Annotated[bool, OfTheRun()] = Field(
        default=False,
        description=(
            "Train the decoder alone: latents, scaling and shift stay those of the pretrained "
            "network, and generators trained on them stay valid."
        ),
    )

    @model_validator(mode="after")
    def _check_frozen(self) -> "_Pretrained":
        if self.freeze_encoder and self.pretrained_model_name_or_path is None:
            raise ValueError(
                "freeze_encoder needs pretrained_model_name_or_path: an encoder that has learned "
                "nothing cannot be kept"
            )
        return self


class _SingleFile(_Pretrained):
    """Of Stable Diffusion's kinds alone."""

    pretrained_family: Annotated[Literal["sd", "sdxl", "sd3", "flux"] | None, OfTheRun()] = Field(
        default=None,
        description="Of a single file: whose autoencoder it is, which says how latents are scaled.",
    )


class _Convolutional(ModelConfig):
    """Residual blocks with GroupNorm."""

    layers_per_block: Positive = Field(
        default=2,
        description="Residual blocks per level of the encoder (the decoder has one more).",
    )
    norm_num_groups: Positive = Field(
        default=32, description="Groups of each GroupNorm; must divide every width."
    )

    @model_validator(mode="after")
    def _check_groups(self) -> "_Convolutional":
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the width {width} of "
                    "block_out_channels"
                )
        return self


class _WithAttention(_Convolutional):
    attention_levels: tuple[Count, ...] = Field(
        default=(),
        description="Levels (0 = full resolution) with self-attention after each residual block.",
    )
    mid_block_add_attention: bool = Field(
        default=True, description="Self-attention in the middle block."
    )

    @model_validator(mode="after")
    def _check_attention(self) -> "_WithAttention":
        self._check_levels("attention_levels", self.attention_levels)
        return self


class KLModelConfig(_WithAttention, _SingleFile):
    """The network: a stock diffusers AutoencoderKL; f = 2 ** (levels - 1)."""

    architecture: Literal["kl"] = "kl"
    use_quant_conv: bool = Field(
        default=True, description="1x1 convolutions around the latent (SD: yes; SD3 and FLUX: no)."
    )
    initial_posterior_logvar: float = Field(
        default=0.0,
        description=(
            "Log-variance that the posterior starts with; below 0 the decoder sees less noise at "
            "first and learns sooner."
        ),
    )

    @property
    def bottleneck(self) -> BottleneckConfig:
        """Options of what turns encoder features into its latent."""
        return GaussianConfig(latent_channels=self.latent_channels)


class AsymmetricModelConfig(_Convolutional, _SingleFile):
    """The network: a stock diffusers AsymmetricAutoencoderKL, Stable Diffusion's encoder with a
    decoder of its own size. Fine-tuning takes either one, or the encoder of an AutoencoderKL."""

    architecture: Literal["asymmetric"] = "asymmetric"
    up_block_out_channels: Widths = Field(
        default=(192, 384, 768, 768),
        description="Width of each level of the decoder, from full resolution: w, 2 w, 4 w, 4 w.",
    )
    layers_per_up_block: Positive = Field(
        default=3, description="Residual blocks per level of the decoder, less one."
    )

    @property
    def bottleneck(self) -> BottleneckConfig:
        """Options of what turns encoder features into its latent."""
        return GaussianConfig(latent_channels=self.latent_channels)

    @model_validator(mode="after")
    def _check_decoder(self) -> "AsymmetricModelConfig":
        w = self.up_block_out_channels[0]
        if self.up_block_out_channels != (w, 2 * w, 4 * w, 4 * w):
            raise ValueError(
                f"up_block_out_channels is {self.up_block_out_channels}, but diffusers' decoder "
                f"can see a picture at w, 2 w, 4 w, 4 w alone, such as {(w, 2 * w, 4 * w, 4 * w)}"
            )
        if len(self.block_out_channels) != 4:
            raise ValueError(
                f"block_out_channels has {len(self.block_out_channels)} levels, but the decoder "
                "has 4: f is 8"
            )
        if w % self.norm_num_groups:
            raise ValueError(
                f"norm_num_groups {self.norm_num_groups} does not divide the width {w} of "
                "up_block_out_channels"
            )
        return self


class DCModelConfig(ModelConfig, _Pretrained):
    """The network: a stock diffusers AutoencoderDC, without a posterior; f = 2 ** (levels - 1)."""

    architecture: Literal["dc"] = "dc"
    encoder_layers_per_block: tuple[Count, ...] = Field(
        default=(2, 2, 2, 3), description="Blocks of each level of the encoder."
    )
    decoder_layers_per_block: tuple[Count, ...] = Field(
        default=(3, 3, 3, 3), description="Blocks of each level of the decoder."
    )
    attention_levels: tuple[Count, ...] = Field(
        default=(), description="Levels (0 = full resolution) of EfficientViT blocks."
    )
    attention_head_dim: Positive = Field(
        default=32, description="Width of an attention head; must divide those levels' widths."
    )

    @model_validator(mode="after")
    def _check(self) -> "DCModelConfig":
        self._check_levels("attention_levels", self.attention_levels)
        self._check_length("encoder_layers_per_block", self.encoder_layers_per_block)
        self._check_length("decoder_layers_per_block", self.decoder_layers_per_block)
        for level in self.attention_levels:
            if self.block_out_channels[level] % self.attention_head_dim:
                raise ValueError(
                    f"attention_head_dim {self.attention_head_dim} does not divide the width "
                    f"{self.block_out_channels[level]} of level {level}"
                )
        return self


class VQModelConfig(_WithAttention, _Pretrained):
    """The network: VQGAN's, around a quantiser; f = 2 ** (levels - 1)."""

    architecture: Literal["vq"] = "vq"
    latent_channels: Positive = Field(
        default=256, description="Width between the encoder and the quantiser's projection."
    )
    likelihood: Literal["logit_laplace"] | None = Field(
        default=None,
        description=(
            "Pixel likelihood whose parameters the decoder gives (DALL-E's logit-Laplace); its "
            "negative logarithm takes the place of rec_loss."
        ),
    )
    quantizer: AnyQuantizerConfig = VectorConfig()

    @property
    def bottleneck(self) -> BottleneckConfig:
        """Options of what turns encoder features into its latent."""
        return self.quantizer

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"quantizer": self.quantizer.arguments()}


MODELS: dict[str, type[ModelConfig]] = {
    "kl": KLModelConfig,
    "asymmetric": AsymmetricModelConfig,
    "dc": DCModelConfig,
    "vq": VQModelConfig,
}
AnyModelConfig = Annotated[
    Annotated[KLModelConfig, Tag("kl")]
    | Annotated[AsymmetricModelConfig, Tag("asymmetric")]
    | Annotated[DCModelConfig, Tag("dc")]
    | Annotated[VQModelConfig, Tag("vq")],
    Discriminator(tag_in("architecture", "kl")),
]
