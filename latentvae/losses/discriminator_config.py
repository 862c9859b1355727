"""The options of the discriminator."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.losses.discriminators import DISCRIMINATORS
from latentvae.option_marks import MayChange, Positive, Private, Section, UpdatesOrShare


class DiscriminatorConfig(Section):
    """The discriminator, its loss and its regularisation."""

    disc_type: Literal["patch", "stylegan"] = Field(
        default="patch",
        description=(
            "Kind of discriminator. patch: one logit per image patch (PatchGAN). stylegan: one "
            "logit per image (StyleGAN2)."
        ),
    )
    disc_norm: Literal["group", "spectral", "none"] | None = Field(
        default=None,
        description=(
            "Norm of the patch discriminator. Default: group. The stylegan discriminator has no "
            "norm."
        ),
    )
    disc_loss: Literal["hinge", "non_saturating"] = Field(
        default="hinge", description="GAN loss of the model and of the discriminator."
    )
    disc_augment: tuple[Literal["color", "translation", "cutout"], ...] = Field(
        default=(),
        description=(
            "DiffAugment operations on all images that the discriminator sees. These operations "
            "help when there are few training images."
        ),
    )
    disc_r1_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Weight of the R1 gradient penalty on real images. The penalty takes the gradient of "
            "an image's mean logit. StyleGAN2's rule for the weight is 0.0002 * resolution^2 / "
            "images per update."
        ),
    )
    disc_r1_interval: Positive = Field(
        default=1,
        description=(
            "Compute the R1 penalty only once in this many updates, and multiply its weight by "
            "this number."
        ),
    )
    disc_lecam_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Weight of the discriminator's LeCam regularisation, which helps when there are few "
            "training images. 0 turns it off."
        ),
    )

    disc_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5,
        description="Weight of the adversarial loss. 0 trains without a discriminator.",
    )
    disc_start: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5,
        description=(
            "Update at which the discriminator starts. A value below 1 is a share of "
            "max_train_steps."
        ),
    )
    disc_warmup_steps: UpdatesOrShare = Field(
        default=0,
        description=(
            "Number of updates after disc_start in which only the discriminator learns. Set this "
            "option for a pretrained model, because its discriminator starts untrained."
        ),
    )
    disc_ramp_steps: UpdatesOrShare = Field(
        default=1000,
        description=(
            "Number of updates after disc_warmup_steps over which the weight of the adversarial "
            "loss grows from 0. The discriminator learns in each of these updates."
        ),
    )
    disc_adaptive_weight: bool = Field(
        default=True,
        description=(
            "Multiply the weight of the adversarial loss by a ratio of gradient norms at the "
            "decoder's last layer: reconstruction loss divided by adversarial loss (VQGAN)."
        ),
    )
    disc_weight_cap: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0,
        description=(
            "Largest adaptive weight. VQGAN's code uses 1e4 with losses that are means over image "
            "elements, like the losses here. Stable Diffusion's code uses 1e4 with sums, see "
            "disc_cap_on_sums."
        ),
    )
    disc_cap_on_sums: bool = Field(
        default=False,
        description=(
            "Interpret disc_weight_cap for losses that are sums over image elements: the cap is "
            "divided by channels * height * width. A cap of 1e4 is then 0.05 at 256 px and 0.013 "
            "at 512 px."
        ),
    )
    disc_learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-4,
        description=(
            "Peak learning rate of the discriminator, which has the same schedule as the model."
        ),
    )
    disc_channels: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        default=64, description="Width of the discriminator's first layer."
    )
    disc_layers: Positive | None = Field(
        default=None,
        description=(
            "Number of discriminator layers that halve the feature map. Default for patch: 3, "
            "which makes patches of 70 x 70 pixels. Default for stylegan: enough to leave 4 pixels "
            "on the shorter side."
        ),
    )

    # This folder may change on resume, because only a new run reads it.
    discriminator_from: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description=(
            "Folder of an earlier run whose discriminator a new run starts with. Use it together "
            "with pretrained_model_name_or_path, which loads only the autoencoder."
        ),
    )
    disc_watch: Annotated[Literal["off", "warn", "disable"], MayChange()] = Field(
        default="warn",
        description=(
            "What to do when the discriminator has won (its loss is near 0), or when validation "
            "LPIPS gets steadily worse while the discriminator is active. warn: print a warning. "
            "disable: also switch the discriminator off for the rest of the run. off: do not "
            "check."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "DiscriminatorConfig":
        if self.disc_norm not in (None, "none", *DISCRIMINATORS[self.disc_type].norms):
            others = [name for name, kind in DISCRIMINATORS.items() if self.disc_norm in kind.norms]
            raise ValueError(
                f"disc_norm {self.disc_norm} is for the {' or '.join(others)} discriminator, but "
                f"{self.disc_type} has no norm. Leave disc_norm out."
            )
        if self.discriminator_from is not None and self.disc_scale == 0:
            raise ValueError(
                f"discriminator_from '{self.discriminator_from}' has no effect with disc_scale 0. "
                "Give disc_scale above 0, or leave discriminator_from out."
            )
        return self
