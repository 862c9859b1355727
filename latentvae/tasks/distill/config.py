"""Define the options of a run that distils an autoencoder into a small one."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.config.run_config import OptimizerConfig, RunConfig
from latentvae.data.data_config import DataConfig
from latentvae.losses.objective_config import PixelLossConfig
from latentvae.option_marks import Elsewhere, MayChange, Positive, Section, Share, Weight
from latentvae.tasks.image_config import ImageJobConfig

BUCKET_MULTIPLE = 64  # the height and width of each aspect-ratio bucket are multiples of this


class StudentConfig(Section):
    """Options of the teacher and of the student, a small autoencoder that learns from it."""

    # On resume, the teacher may be in another folder. `DistillTask.identity` checks that its
    # weights are the same.
    teacher: Annotated[str | None, MayChange(), Elsewhere("teacher_model vae")] = Field(
        default=None,
        description=(
            "Autoencoder to distil (the teacher). Give a folder (such as an exported model), a "
            "single file, or a name on the Hub (owner/name/folder). The teacher must not be a "
            "tokenizer. Every distillation needs this option."
        ),
    )
    student: Annotated[Literal["decoder", "encoder", "both"], Elsewhere("train_part")] = Field(
        default="decoder",
        description=(
            "Part of the small autoencoder (the student) that is trained. `decoder` learns to "
            "decode the teacher's latents. `encoder` learns to make the teacher's latents. `both` "
            "trains encoder and decoder. Even with `both`, the student's decoder learns from the "
            "teacher's latents, not from the latents of the student's encoder."
        ),
    )
    student_channels: Annotated[Positive, Elsewhere("width")] = Field(
        default=64,
        description=(
            "Number of channels of all layers of the student (an AutoencoderTiny). TAESD has 64."
        ),
    )
    student_blocks: Positive = Field(
        default=3,
        description=(
            "Number of residual blocks of the student at each resolution. At full resolution, "
            "there is always one block."
        ),
    )
    decoder_block_out_channels: tuple[int, ...] = Field(
        default=(),
        description=(
            "Number of channels of each level of the student's decoder, from full resolution down. "
            "This option is only for a FLUX.2 teacher. By default, each number is three quarters "
            "of the teacher's number."
        ),
    )
    pretrained_model_name_or_path: Annotated[str | None, MayChange()] = Field(
        default=None,
        description=(
            "Small autoencoder to start from, such as TAESD. The student then has the shape of "
            "this autoencoder. By default, the student is a new network."
        ),
    )


class DistillLossConfig(PixelLossConfig):
    """Options of the student's loss."""

    teacher_share: Share = Field(
        default=0.0,
        description=(
            "Fraction (0 to 1) of the decoder's loss that compares the student's image with the "
            "teacher's reconstruction. The rest of the loss compares the student's image with the "
            "original image. With 0, the teacher's decoder is not needed in training, which saves "
            "much time."
        ),
    )
    latent_scale: Weight = Field(
        default=1.0,
        description=(
            "Weight of the encoder's loss, which is the mean squared error between the student's "
            "latents and the teacher's latents. For this loss, the teacher's latents are scaled to "
            "a variance of about 1."
        ),
    )
    latent_noise: Weight = Field(
        default=0.0,
        description=(
            "Noise on the latents that the decoder reads in training. For each image, the noise's "
            "standard deviation is drawn at random between 0 and this fraction of the latents' "
            "standard deviation. With more noise, the decoder tolerates larger errors in a "
            "generator's latents, but the decoder's images are less sharp. 0 means no noise."
        ),
    )


class DistillRunConfig(RunConfig):
    """Options of the training run: its length, batch size, precision, files and logs."""

    num_sample_images: Annotated[Positive, MayChange()] = Field(
        default=6,
        description=(
            "Number of validation images in each grid of sample images that training writes."
        ),
    )


class DistillConfig(ImageJobConfig):
    """All options of a run that distils an autoencoder."""

    config: Annotated[str, MayChange()] = Field(
        default="tiny_small",
        description=(
            "YAML file with options, or the name of a preset (a YAML file that comes with this "
            "package). Flags override the values in the file or preset."
        ),
    )
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    objective: DistillLossConfig = DistillLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: DistillRunConfig = DistillRunConfig()

    @property
    def bucket_multiple(self) -> int:
        return BUCKET_MULTIPLE

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        self.check_batch()
        if self.run.mixed_precision == "fp16":
            raise ValueError("mixed_precision fp16 is not supported. Use bf16 or no instead.")
        if self.student.student == "encoder":
            for name in ("teacher_share", "latent_noise"):
                if value := getattr(self.objective, name):
                    raise ValueError(
                        f"{name} {value:g} is for the decoder's loss, but only the encoder learns "
                        "(student encoder). Leave it out."
                    )
        return self
