"""A run of seconds: a tiny network on the sample photos at 32 px, with every part of the loop in
it."""

import shutil
from pathlib import Path
from typing import Any

from latentvae.engine.checkpoint_files import checkpoints, newest_usable, update_of
from latentvae.engine.processes import start_accelerator
from latentvae.engine.training import Training, build_training
from latentvae.models.table import MODELS
from latentvae.option_marks import ChosenByPreset, marked
from latentvae.tasks.autoencoder.config import TrainConfig, parse
from latentvae.tasks.autoencoder.task import AutoencoderTask


def small_config(
    output_dir: Path, model: dict[str, Any] | None = None, **changes: Any
) -> TrainConfig:
    """Six updates of two micro-steps over epochs of five batches: edges fall inside updates.

    Args:
        model: the whole section, for another architecture.
    """
    options: dict[str, dict[str, Any]] = {
        "model": {"block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4},
        "data": {
            "train_data_dir": "samples",
            "resolution": 32,
            "image_interpolation_mode": "bilinear",
        },
        "objective": {"lpips_net": "alex", "learn_logvar": True},
        "discriminator": {
            "disc_start": 2,
            "disc_ramp_steps": 2,
            "disc_channels": 16,
            "disc_layers": 2,
        },
        "optimizer": {"lr_warmup_steps": 2, "lr_scheduler": "cosine", "learning_rate": 1e-3},
        "run": {
            "output_dir": str(output_dir),
            "max_train_steps": 6,
            "train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "checkpointing_steps": 2,
            "checkpoints_total_limit": 9,
            "validation_steps": 3,
            "log_steps": 2,
        },
    }

    # apply the changes
    if model is not None:
        options["model"] = model
    for name, value in changes.items():
        options[section_of(name)][name] = value
    return parse(options, source="test")


def built(config: TrainConfig, folder: Path) -> Training:
    """The training of a configuration, before its first update."""
    task = AutoencoderTask(config)
    task.open()
    return build_training(task, folder=folder, accelerator=start_accelerator(config.run, folder))


def broken_off(run: Path, folder: Path, *, update: int) -> Path:
    """Copy a finished run as it would be if it had been killed after the checkpoint of `update`.

    The log keeps the rows of later updates, which a resume takes back.
    """
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "export")
    for checkpoint in checkpoints(folder):
        if update_of(checkpoint) > update:
            shutil.rmtree(checkpoint)
    assert newest_usable(folder) == (folder / f"checkpoint-{update}", [])
    return folder


def section_of(option: str) -> str:
    """The section of an option, of whichever architecture."""
    if any(option in model.model_fields for model in MODELS.values()):
        return "model"
    return next(
        section
        for section, field in TrainConfig.model_fields.items()
        if option in getattr(field.annotation, "model_fields", {})
    )


def as_flags(config: TrainConfig) -> list[str]:
    """The same run on a command line."""
    from latentvae.config.run_config import flat

    flags: list[str] = []
    no_flags = ("config", *marked(TrainConfig, ChosenByPreset))
    for name, value in flat(config).items():
        if name == "mixed_precision":
            value = value or "no"  # the preset's `auto` depends on the machine
        if name in no_flags or value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, tuple):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags
