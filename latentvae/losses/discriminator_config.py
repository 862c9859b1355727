"""The options of the discriminator."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.losses.discriminators import DISCRIMINATORS
from latentvae.option_marks import MayChange, Positive, Private, Section, UpdatesOrShare


class DiscriminatorConfig(Section):
    """Options of the discriminator, of its loss and of its regularisation."""

    disc_type: Literal["patch", "stylegan"] = Field(
        default="patch",
        description=(
            "Kind of discriminator. `patch` returns one logit per image patch (PatchGAN). "
            "`stylegan` returns one logit per image (StyleGAN2)."
        ),
    )
    disc_norm: Literal["group", "spectral", "none"] | None = Field(
        default=None,
        description=(
            "Normalisation in the patch discriminator: `group` (GroupNorm layers), `spectral` "
            "(spectral normalisation of the weights) or `none`. The default is `group`. The "
            "discriminator `stylegan` has no normalisation."
        ),
    )
    disc_loss: Literal["hinge", "non_saturating"] = Field(
        default="hinge", description="GAN loss for the model and the discriminator."
    )
    disc_augment: tuple[Literal["color", "translation", "cutout"], ...] = Field(
        default=(),
        description=(
            "DiffAugment operations that are applied to all images before the discriminator sees "
            "them. These operations help when there are few training images. By default, no "
            "operation is applied."
        ),
    )
    disc_r1_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Weight of the R1 gradient penalty on real images. The penalty is half the squared "
            "norm of the gradient of an image's mean logit with respect to the image. StyleGAN2 "
            "uses the weight 0.0002 * resolution^2 / (number of images per update). 0 turns the "
            "penalty off."
        ),
    )
    disc_r1_interval: Positive = Field(
        default=1,
        description=(
            "Compute the R1 penalty once in this many updates. To compensate, the weight of the "
            "penalty is multiplied by this number."
        ),
    )
    disc_lecam_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description=(
            "Weight of the LeCam regularisation of the discriminator. This regularisation helps "
            "when there are few training images. 0 turns it off."
        ),
    )

    disc_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5,
        description="Weight of the adversarial loss. 0 trains the model without a discriminator.",
    )
    disc_start: Annotated[float, Field(ge=0.0)] = Field(
        default=0.5,
        description=(
            "Update at which the discriminator starts to learn. A value between 0 and 1 is a "
            "fraction of the whole training (max_train_steps)."
        ),
    )
    disc_warmup_steps: UpdatesOrShare = Field(
        default=0,
        description=(
            "Number of updates in which only the discriminator learns, starting at disc_start. Set "
            "this option when you fine-tune a pretrained model with a new, untrained "
            "discriminator."
        ),
    )
    disc_ramp_steps: UpdatesOrShare = Field(
        default=1000,
        description=(
            "Number of updates over which the weight of the adversarial loss grows from 0 to "
            "disc_scale. This growth begins after the updates of disc_warmup_steps. The "
            "discriminator also learns while the weight grows."
        ),
    )
    disc_adaptive_weight: bool = Field(
        default=True,
        description=(
            "Use the adaptive weight of VQGAN as a factor on disc_scale. This factor is the "
            "gradient norm of the reconstruction loss divided by the gradient norm of the "
            "adversarial loss. Both gradients are taken with respect to the decoder's last layer."
        ),
    )
    disc_weight_cap: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0,
        description=(
            "Largest value of the adaptive weight (see disc_adaptive_weight). To use the limit of "
            "VQGAN's code, give 1e4. The losses in that code are means over image elements, as in "
            "this program. To use the limit of Stable Diffusion's code, give 1e4 and also "
            "disc_cap_on_sums, because the losses in that code are sums."
        ),
    )
    disc_cap_on_sums: bool = Field(
        default=False,
        description=(
            "Read disc_weight_cap as the limit for losses that are sums over image elements, as in "
            "Stable Diffusion's code. The losses of this program are means, so the program divides "
            "the limit by channels * height * width. For RGB images, a limit of 1e4 becomes 0.05 "
            "at 256 px and 0.013 at 512 px."
        ),
    )
    disc_learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-4,
        description=(
            "Peak learning rate of the discriminator. This learning rate has the same schedule as "
            "the learning rate of the model."
        ),
    )
    disc_channels: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        default=64, description="Number of channels of the discriminator's first layer."
    )
    disc_layers: Positive | None = Field(
        default=None,
        description=(
            "Number of discriminator layers that halve the height and width of the feature map. "
            "The default for `patch` is 3, which makes patches of 70 x 70 pixels. The default for "
            "`stylegan` is the number of layers after which the shorter side of the feature map "
            "has 4 positions."
        ),
    )

    # This option may change on resume, because only a new run reads the folder.
    discriminator_from: Annotated[str | None, MayChange(), Private()] = Field(
        default=None,
        description=(
            "Output folder of an earlier training. The new training starts with the discriminator "
            "of the earlier training. Use this option together with pretrained_model_name_or_path, "
            "which loads only the autoencoder."
        ),
    )
    disc_watch: Annotated[Literal["off", "warn", "disable"], MayChange()] = Field(
        default="warn",
        description=(
            "Check during training whether the discriminator fails. The discriminator fails if its "
            "loss is near 0, or if validation LPIPS gets steadily worse while the discriminator is "
            "active. `warn` prints a warning if the discriminator fails. `disable` also switches "
            "the failing discriminator off for the rest of the training. `off` turns this check "
            "off."
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
