"""A small run of the likelihood task, on digits of a few pixels drawn by code."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentvae.config.presets import parse
from latentvae.tasks.likelihood.config import LikelihoodConfig

SIDE = 8
CLASSES = {
    "architecture": "classes",
    "latent_units": (4,),
    "hidden_channels": (24,),
}
HIERARCHY = {
    "architecture": "hierarchical",
    "enc_blocks": "8x1,8d2,4x1,4d4,1x1",
    "dec_blocks": "1x1,4m1,8m4",
    "width": 16,
    "zdim": 4,
}


def write_bars(folder: Path, *, count: int = 64) -> Path:
    """Write grey pictures with one bright bar each, of a random place and direction."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for i in range(count):
        pixels = np.full((SIDE, SIDE), 10, dtype=np.uint8)
        place = draws.integers(0, SIDE - 1)
        bar = (slice(place, place + 2), slice(None))
        pixels[bar if i % 2 else bar[::-1]] = 240
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def write_classes(folder: Path, *, count: int = 64) -> Path:
    """Write pictures with a bright bar at the left or right, some without the folder of a class."""
    draws = np.random.default_rng(0)
    for name in ("left", "right", "unlabelled"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        pixels = np.full((SIDE, SIDE), 10, dtype=np.uint8)
        top, kind = draws.integers(0, SIDE // 2), ("left", "right")[i % 2]
        pixels[top : top + SIDE // 2, slice(0, 3) if kind == "left" else slice(5, 8)] = 240
        Image.fromarray(pixels).save(folder / ("unlabelled" if i < 6 else kind) / f"{i:03d}.png")
    return folder


def small_likelihood(images: Path, out: Path, **changes: Any) -> LikelihoodConfig:
    """Return the options of a small run. `changes` holds sections, or options of `run`."""
    sections: dict[str, dict[str, Any]] = {
        "vae": {"architecture": "dense", "latent_units": (4,), "hidden_channels": (24,)},
        "data": {
            "train_data_dir": str(images),
            "resolution": SIDE,
            "crop": "center",
            "random_flip": False,
            "binarize": "dynamic",
            "validation_share": 0.2,
        },
        "objective": {},
        "optimizer": {"learning_rate": 1e-2, "lr_warmup_steps": 2, "max_grad_norm": 100.0},
        "run": {
            "output_dir": str(out),
            "max_train_steps": 6,
            "train_batch_size": 8,
            "checkpointing_steps": 6,
            "validation_steps": 6,
            "log_steps": 2,
            "num_sample_images": 4,
        },
    }
    for name, value in changes.items():
        section = sections.get(name)
        if name == "vae" and "architecture" in value:
            sections["vae"] = value
        elif section is not None and isinstance(value, dict):
            section.update(value)
        else:
            sections["run"][name] = value
    return parse(sections, LikelihoodConfig, source="test")
