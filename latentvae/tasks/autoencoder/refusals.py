"""What is refused before any work, without touching a file."""

import itertools
import os
from pathlib import Path

from latentvae.config.autoencoder import TrainConfig
from latentvae.engine.publishing import repository
from latentvae.engine.tracker import check_tracker
from latentvae.errors import UserError
from latentvae.losses.discriminators import smallest_side
from latentvae.losses.perceptual import MIN_SIZE
from latentvae.metrics.image import SSIM_MIN_SIZE


def check_paths(config: TrainConfig) -> Path:
    """The run's folder; refuses what is missing without touching a file."""
    if config.data.train_data_dir is None and config.data.dataset_name is None:
        raise UserError(
            "train_data_dir is missing: give a folder of images, or `samples` for the "
            "photos that come with scikit-image; or dataset_name"
        )
    if config.run.output_dir is None:
        raise UserError(
            "output_dir is missing: give the folder to write the run to, such as runs/first"
        )
    wanted = config.run.resume_from_checkpoint
    if config.run.overwrite_output_dir and wanted != "latest":
        raise UserError(
            f"resume_from_checkpoint '{wanted}' goes on with a run that overwrite_output_dir "
            "deletes; give one of them"
        )
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "the launcher set MASTER_ADDR but not WORLD_SIZE: it was asked for several "
            "processes and started one; on CPUs launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    _check_resolution(config)
    check_tracker(config.run.report_to)
    folder = Path(config.run.output_dir)
    if config.run.push_to_hub:
        repository(config.run.hub_model_id, folder)
    return folder


def _check_resolution(config: TrainConfig) -> None:
    """Every part of the run must have something to look at."""
    net, critic = config.objective.lpips_net, config.critic
    needs = {
        "SSIM": SSIM_MIN_SIZE,
        f"LPIPS-{net}": MIN_SIZE[net],
        f"the {critic.disc_type} critic": (
            smallest_side(critic.disc_type, critic.disc_layers) if critic.disc_scale else 0
        ),
    }
    part, least = max(needs.items(), key=lambda need: need[1])
    height, width = config.data.size
    own = str(height) if height == width else f"{height} {width}"
    if min(height, width) < least:
        raise UserError(f"resolution {own} is too small: {part} needs at least {least} px")
    narrowest = min(map(min, config.train_sizes))
    if narrowest < least:
        raise UserError(
            f"the narrowest bucket of resolution {own} has a side of {narrowest}, which is too "
            f"small: {part} needs at least {least} px; resolution {_least(config, least)} is the "
            "least that has it, or leave aspect_ratio_buckets out"
        )


def _least(config: TrainConfig, side: int) -> str:
    """The next resolution of about that shape whose buckets all have such a side."""
    (height, width), f = config.data.size, config.model.f
    for taller in itertools.count(height + f, f):
        wider = max(round(taller * width / height / f), 1) * f
        if min(map(min, config.sizes_at((taller, wider)))) >= side:
            return str(taller) if height == width else f"{taller} {wider}"
    raise AssertionError


def check_compilation(config: TrainConfig, *, processes: int) -> None:
    """Refuse what the compiler has failed at."""
    if config.run.torch_compile and processes > 1:
        raise UserError(
            f"torch_compile is for one process so far, and {processes} were started: with several "
            "the compiler fails in the backward pass; leave --torch_compile out"
        )
