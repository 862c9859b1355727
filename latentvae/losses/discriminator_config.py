"""The options of the discriminator."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.losses.discriminators import DISCRIMINATORS
from latentvae.option_marks import Count, MayChange, Positive, Section


class DiscriminatorConfig(Section):
    """The discriminator, its loss and what keeps it stable."""

    disc_type: Literal["patch", "stylegan"] = Field(
        default="patch",
        description="Logits of image patches (PatchGAN), or one per image (StyleGAN2's).",
    )
    disc_norm: Literal["group", "spectral", "none"] | None = Field(
        default=None,
        description="Norm of the patch discriminator, by default group; stylegan has none.",
    )
    disc_loss: Literal["hinge", "non_saturating"] = Field(
        default="hinge", description="GAN loss of both sides."
    )
    disc_augment: tuple[Literal["color", "translation", "cutout"], ...] = Field(
        default=(), description="DiffAugment of all that the discriminator sees."
    )
    disc_r1_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Weight of the R1 penalty on real images, for an image's mean logit; StyleGAN2's rule "
            "is 0.0002 * resolution^2 / images per update."
        ),
    )
    disc_r1_interval: Positive = Field(
        default=1, description="Take R1 in every so many updates, weighted up by as much."
    )
    disc_lecam_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="Weight of LeCam regularisation; 0 leaves it out."
    )

    disc_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5, description="Weight of the adversarial term; 0 leaves the discriminator out."
    )
    disc_start: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5,
        description=(
            "Update in which the discriminator starts. Below 1: a share of max_train_steps."
        ),
    )
    disc_warmup_steps: Count = Field(
        default=0,
        description=(
            "Updates after the start in which only the discriminator learns. Set this for a "
            "pretrained model, because its discriminator starts untrained."
        ),
    )
    disc_ramp_steps: Count = Field(
        default=1000,
        description=(
            "Updates over which the adversarial weight then grows from 0; the discriminator "
            "learns in each of them."
        ),
    )
    disc_adaptive_weight: bool = Field(
        default=True,
        description=(
            "Balance the adversarial against the reconstruction gradient at the last layer."
        ),
    )
    disc_weight_cap: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0,
        description=(
            "Largest adaptive weight. Losses are means here: Stable Diffusion's cap of 1e4 on sums "
            "is 1e4 / (3 * resolution^2), 0.05 at 256 px."
        ),
    )
    disc_learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-4,
        description="Peak learning rate of the discriminator; it follows the model's schedule.",
    )
    disc_channels: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        default=64, description="Width of the discriminator's first layer."
    )
    disc_layers: Positive | None = Field(
        default=None,
        description=(
            "Number of layers that halve the feature map. Default: 3 for patch (it then sees "
            "patches of 70 pixels); for stylegan as many as leave 4 pixels on the shorter side."
        ),
    )

    disc_watch: Annotated[Literal["off", "warn", "disable"], MayChange()] = Field(
        default="warn",
        description=(
            "What to do when the discriminator has won (its loss is near 0), or validation LPIPS "
            "gets steadily worse while it runs. warn: print a warning. disable: also switch the "
            "discriminator off for the rest of the run. off: do not check."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "DiscriminatorConfig":
        if self.disc_norm not in (None, "none", *DISCRIMINATORS[self.disc_type].norms):
            others = [name for name, kind in DISCRIMINATORS.items() if self.disc_norm in kind.norms]
            raise ValueError(
                f"disc_norm {self.disc_norm} is for the {' or '.join(others)} discriminator; "
                f"{self.disc_type} has none"
            )
        return self
