"""A distillation of seconds: a tiny teacher, and a tinier student on the sample photos at 32 px."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentvae.models import build_autoencoder_kl
from latentvae.tasks.distill.config import DistillConfig


def teacher(**options: Any) -> AutoencoderKL:
    """Return a network of f = 4 whose latents pipelines shift by 0.5 and scale by 0.2."""
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    net = build_autoencoder_kl(**widths, **options)
    with torch.no_grad():  # latents of standard deviation 5 about 0.5
        net.quant_conv.weight.mul_(40.0)
    net.register_to_config(scaling_factor=0.2, shift_factor=0.5)
    return net.eval()


def small_distill(teacher: Path | str, folder: Path, **changes: Any) -> DistillConfig:
    """Six updates of two micro-steps. Changes are values of `run`, or sections given as a dict."""
    values: dict[str, dict[str, Any]] = {
        "student": {"teacher": str(teacher), "student_channels": 8, "student_blocks": 1},
        "data": {"train_data_dir": "samples", "resolution": 32},
        "objective": {"lpips_net": "alex", "perceptual_scale": 0.1},
        "optimizer": {"learning_rate": 3e-3, "lr_warmup_steps": 2, "ema_decay": 0.8},
        "run": {
            "output_dir": str(folder),
            "max_train_steps": 6,
            "train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "checkpointing_steps": 2,
            "checkpoints_total_limit": 9,
            "validation_steps": 6,
            "log_steps": 2,
            "mixed_precision": "no",
        },
    }
    for name, value in changes.items():
        if isinstance(value, dict):
            values[name] |= value
        else:
            values["run"][name] = value
    return DistillConfig.model_validate(values)
