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
        description="Norm of the patch discriminator. Default: group. stylegan has no norm.",
    )
    disc_loss: Literal["hinge", "non_saturating"] = Field(
        default="hinge", description="GAN loss of the model and of the discriminator."
    )
    disc_augment: tuple[Literal["color", "translation", "cutout"], ...] = Field(
        default=(),
        description=(
            "DiffAugment of all images that the discriminator sees. Use it when there are few "
            "training images."
        ),
    )
    disc_r1_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Weight of the R1 penalty on real images. It is for an image's mean logit. StyleGAN2's "
            "rule is 0.0002 * resolution^2 / images per update."
        ),
    )
    disc_r1_interval: Positive = Field(
        default=1,
        description=(
            "Compute R1 only in every so many updates, with a weight that is as many times larger."
        ),
    )
    disc_lecam_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Weight of LeCam regularisation, which helps when there are few images. 0 leaves it "
            "out."
        ),
    )

    disc_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5,
        description="Weight of the adversarial term. 0 leaves the discriminator out.",
    )
    disc_start: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5,
        description=(
            "Update in which the discriminator starts. A value below 1 is a share of "
            "max_train_steps."
        ),
    )
    disc_warmup_steps: UpdatesOrShare = Field(
        default=0,
        description=(
            "Updates after the start in which only the discriminator learns. Set this for a "
            "pretrained model, because its discriminator starts untrained."
        ),
    )
    disc_ramp_steps: UpdatesOrShare = Field(
        default=1000,
        description=(
            "Updates after that over which the adversarial weight grows from 0. The discriminator "
            "learns in each of them."
        ),
    )
    disc_adaptive_weight: bool = Field(
        default=True,
        description=(
            "Multiply the adversarial weight by the ratio of the gradients of reconstruction and "
            "adversarial loss at the decoder's last layer (VQGAN)."
        ),
    )
    disc_weight_cap: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0,
        description=(
            "Largest adaptive weight. VQGAN's code has 1e4 on losses that are means over image "
            "elements, as they are here. Stable Diffusion's has 1e4 on sums, see disc_cap_on_sums."
        ),
    )
    disc_cap_on_sums: bool = Field(
        default=False,
        description=(
            "Take disc_weight_cap for losses that are sums over image elements: it is divided by "
            "channels * height * width. 1e4 is then 0.05 at 256 px and 0.013 at 512 px."
        ),
    )
    disc_learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-4,
        description="Peak learning rate of the discriminator. It follows the model's schedule.",
    )
    disc_channels: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        default=64, description="Width of the discriminator's first layer."
    )
    disc_layers: Positive | None = Field(
        default=None,
        description=(
            "Number of layers that halve the feature map. Default for patch: 3, whose patches have "
            "70 pixels a side. Default for stylegan: as many as leave 4 pixels on the shorter side."
        ),
    )

    # May change on resume, because only a new run reads it.
    discriminator_from: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description=(
            "Folder of an earlier run whose discriminator a new run starts with. Use it beside "
            "pretrained_model_name_or_path, which loads only the autoencoder."
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
                f"disc_norm {self.disc_norm} is for the {' or '.join(others)} discriminator, but "
                f"{self.disc_type} has no norm. Leave disc_norm out."
            )
        if self.discriminator_from is not None and self.disc_scale == 0:
            raise ValueError(
                f"discriminator_from '{self.discriminator_from}' has no effect with disc_scale 0. "
                "Give disc_scale above 0, or leave discriminator_from out."
            )
        return self
