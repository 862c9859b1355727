"""Find schedules (such as a warm-up) that end after the run, and validations of too few images."""

import math

from latentvae.data.sample_photos import SAMPLES
from latentvae.errors import UserError
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.image_config import ImageJobConfig

LEAST_VALIDATION_IMAGES = 8


def check_model_learns(config: TrainConfig) -> None:
    """Check that the model itself learns, not only the discriminator.

    Raises:
        UserError: the discriminator's warm-up takes all updates.
    """
    options, total = config.discriminator, config.run.max_train_steps
    alone, start = options.disc_warmup_steps, config.discriminator_start
    if options.disc_scale > 0 and start == 0 and alone >= total:
        raise UserError(
            f"the model would make no update: disc_warmup_steps {alone:,} lets only the "
            f"discriminator learn, from the start to the end of the run (max_train_steps "
            f"{total:,}). Give --max_train_steps above {alone:,}, or --disc_warmup_steps "
            f"{total // 10} (or a fraction of the run, such as 0.1)."
        )


def without_effect(config: TrainConfig) -> list[str]:
    """Return one warning for each schedule (such as a warm-up) whose end the run does not reach.

    The schedules of the discriminator give at most one warning together.
    """
    options, objective = config.discriminator, config.objective
    total = config.run.max_train_steps
    found = []

    # the discriminator
    start, alone = config.discriminator_start, options.disc_warmup_steps
    ramp = options.disc_ramp_steps
    if options.disc_scale > 0:
        if start >= total:
            found.append(_line("disc_start", start, start, total, "the discriminator never starts"))
        elif start + alone >= total and alone:
            lost = "the model does not learn after the discriminator's start"
            found.append(_line("disc_warmup_steps", alone, start + alone, total, lost))
        elif start + alone + ramp >= total and ramp:
            share = max(total - 1 - start - alone, 0) / ramp
            lost = f"the adversarial weight reaches only {share:.0%} of disc_scale"
            found.append(_line("disc_ramp_steps", ramp, start + alone + ramp, total, lost))

    # the KL
    if config.model.has_kl and not config.model.freeze_encoder:
        warmup, growth = objective.kl_warmup_steps, objective.kl_capacity_steps
        if objective.kl_scale > 0 and warmup >= total:
            lost = f"the KL's weight reaches only {(total - 1) / warmup:.0%} of kl_scale"
            found.append(_line("kl_warmup_steps", warmup, warmup, total, lost))
        if objective.kl_capacity > 0 and growth >= total:
            lost = f"the capacity reaches only {(total - 1) / growth:.0%} of kl_capacity"
            found.append(_line("kl_capacity_steps", growth, growth, total, lost))

    # the temperature of Gumbel-softmax
    bottleneck = config.model.bottleneck
    steps = getattr(bottleneck, "temperature_steps", 0)
    if steps >= total:
        found.append(
            f"temperature_steps {steps:,} is past the end of the run (max_train_steps {total:,}): "
            f"the temperature falls only to {bottleneck.temperature_at(total - 1):.2g}. Give "
            f"--temperature_steps {max(total // 2, 1)}."
        )
    return found


def few_validation_images(config: ImageJobConfig, *, count: int, training: int | None) -> list[str]:
    """Return a list with one warning if the validation has too few images for reliable metrics.

    Args:
        config: the run's options.
        count: number of validation images.
        training: number of training images. None means unknown.
    """
    used = min(count, config.data.max_validation_images)
    if used >= LEAST_VALIDATION_IMAGES:
        return []

    advice = f"Give at least {LEAST_VALIDATION_IMAGES} images in validation_data_dir."
    if count >= LEAST_VALIDATION_IMAGES:
        advice = f"Give --max_validation_images {LEAST_VALIDATION_IMAGES} or more."
    elif config.data.train_data_dir == SAMPLES:
        advice = "Give other images with --validation_data_dir."
    elif config.data.validation_data_dir is None and training is not None:
        total = training + count
        share = min(math.ceil(200 * LEAST_VALIDATION_IMAGES / total) / 100, 0.5)
        advice = f"Give --validation_share {share:g} ({total:,} images in all), or other images "
        advice += "with --validation_data_dir."
    plural = "" if used == 1 else "s"
    return [
        f"the validation has only {used} image{plural}, so its metrics and the model card are not "
        f"reliable. {advice}"
    ]


def _line(name: str, value: int, end: int, total: int, lost: str) -> str:
    reaches = "" if value == end else f" ends at update {end:,}, which"
    return (
        f"{name} {value:,}{reaches} is past the end of the run (max_train_steps {total:,}): "
        f"{lost}. Give {name} as a fraction of the run, such as 0.1."
    )
