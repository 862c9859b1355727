"""Check options before a run starts. No check changes a file."""

import itertools

from latentvae.errors import UserError
from latentvae.losses.discriminators import smallest_side
from latentvae.losses.perceptual import MIN_SIZE
from latentvae.metrics.image import SSIM_MIN_SIZE
from latentvae.models import FAMILIES
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.image_config import ImageJobConfig


def check_images(config: TrainConfig) -> None:
    """Check that an option names the images, and that the resolution is not too small.

    SSIM, LPIPS and the discriminator need images of a minimum size.

    Raises:
        UserError: no option says where the images are, or the resolution is too small.
    """
    check_source(config)
    _check_resolution(config)


def check_source(config: ImageJobConfig) -> None:
    """Check that an option names the training images. Otherwise raise UserError."""
    if config.data.train_data_dir is None and config.data.dataset_name is None:
        raise UserError(
            "train_data_dir is missing. Give a folder of images, or `samples` for 21 sample "
            "photos. Or give dataset_name."
        )


def _check_resolution(config: TrainConfig) -> None:
    """Check that all image sizes are large enough for SSIM, LPIPS and the discriminator."""
    # the metric or network that needs the largest images
    net, discriminator = config.objective.lpips_net, config.discriminator
    needs = {
        "SSIM": SSIM_MIN_SIZE,
        f"LPIPS-{net}": MIN_SIZE[net],
        f"the {discriminator.disc_type} discriminator": (
            smallest_side(discriminator.disc_type, discriminator.disc_layers)
            if discriminator.disc_scale
            else 0
        ),
    }
    part, least = max(needs.items(), key=lambda need: need[1])

    # the resolution, and the narrowest aspect-ratio bucket
    height, width = config.data.size
    own = str(height) if height == width else f"{height} {width}"
    if min(height, width) < least:
        raise UserError(
            f"resolution {own} is too small: {part} needs at least {least} px. "
            f"{_smaller_part(config, part, min(height, width))}"
        )
    narrowest = min(map(min, config.train_sizes))
    if narrowest < least:
        raise UserError(
            f"the narrowest bucket of resolution {own} has a side of {narrowest} px, which is too "
            f"small: {part} needs at least {least} px. The smallest resolution that works is "
            f"{_least(config, least)}. Or leave aspect_ratio_buckets out."
        )


def _smaller_part(config: TrainConfig, part: str, side: int) -> str:
    """Return what to change if images with the shorter side `side` are too small for `part`."""
    f = config.model.f
    least = -(-SSIM_MIN_SIZE // f) * f
    if part.startswith("LPIPS"):
        nets = [net for net, needed in MIN_SIZE.items() if needed <= side]
        validated = "" if config.objective.perceptual_scale else ", which validation uses too"
        if nets:
            return f"Give --lpips_net {nets[0]} ({MIN_SIZE[nets[0]]} px){validated}."
    elif part.endswith("discriminator"):
        return "Give a smaller --disc_layers, or --disc_scale 0 for none."
    return f"Give a larger resolution (at least {least}, a multiple of {f})."


def _least(config: TrainConfig, side: int) -> str:
    """Return the next larger resolution of similar aspect ratio without a side below `side`.

    The aspect-ratio buckets of the returned resolution have no side below `side` either.
    """
    (height, width), f = config.data.size, config.model.f
    for taller in itertools.count(height + f, f):
        wider = max(round(taller * width / height / f), 1) * f
        if min(map(min, config.sizes_at((taller, wider)))) >= side:
            return str(taller) if height == width else f"{taller} {wider}"
    raise AssertionError


def check_compilation(config: TrainConfig, *, processes: int) -> None:
    """Check that torch_compile is used with one process only.

    With several processes, the compiler fails in the backward pass.

    Raises:
        UserError: torch_compile is used with several processes.
    """
    if config.run.torch_compile and processes > 1:
        raise UserError(
            f"torch_compile works with one process only, and {processes} were started. With "
            "several processes, the compiler fails in the backward pass. Leave --torch_compile out."
        )


def memory_advice(config: TrainConfig, general: list[str]) -> list[str]:
    """Return options that need less memory, in the order to try them.

    Args:
        config: the run's options.
        general: advice that applies to every task.
    """
    own = []
    cannot_checkpoint = FAMILIES[config.model.architecture].why_no_checkpointing
    if not config.run.gradient_checkpointing and not cannot_checkpoint:
        own.append("--gradient_checkpointing")
    precision = [advice for advice in general if "mixed_precision" in advice]
    others = [advice for advice in general if advice not in precision]
    f = config.model.f
    smaller = [max(side // 2 // f * f, f) for side in config.data.size]
    resolution = f"--resolution {' '.join(map(str, dict.fromkeys(smaller)))}"
    return [*others, *own, *precision, resolution]
