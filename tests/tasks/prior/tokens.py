"""Token shards for tests of priors: patterns that a tiny prior learns in a second."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentvae.latents.encode import encode_folder
from latentvae.latents.shard_dataset import ShardReader
from latentvae.priors.sample import write_samples
from latentvae.tasks.prior.config import PriorConfig
from tests.tiny import spread_vq

CLASSES = ("ant", "bee")


def pictures(folder: Path) -> Path:
    """Twelve pictures of 8 px in two classes."""
    for index in range(12):
        noise = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        path = folder / CLASSES[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    return folder


def patterns(num: int, *, num_codes: int, length: int) -> tuple[Tensor, Tensor]:
    """Sequences that count up from a random start, by 1 in class 0 and by 2 in class 1.

    The best bits per token are log2 K / T, if the class is known.
    """
    draws = torch.Generator().manual_seed(0)
    classes = torch.arange(num) % 2
    start = torch.randint(num_codes, (num, 1), generator=draws)
    return (start + torch.arange(length) * (1 + classes[:, None])) % num_codes, classes


def halves(num: int, *, num_codes: int, length: int) -> tuple[Tensor, Tensor]:
    """Sequences of eight codes, the first eight in class 0, and others in class 1."""
    classes = torch.arange(num) % 2
    drawn = torch.randint(8, (num, length), generator=torch.Generator().manual_seed(0))
    return num_codes // 2 * classes[:, None] + drawn, classes


def write_patterns(root: Path, *, num: int = 256, make: Any = patterns) -> tuple[Path, Path]:
    """Write a tokenizer, and shards of patterns as if they were its tokens. Return both."""
    tokenizer = root / "tokenizer"
    spread_vq().save_pretrained(tokenizer)
    encode_folder(tokenizer, pictures(root / "photos"), root / "encoded", resolution=8)
    content = ShardReader(root / "encoded").content
    assert content.num_codes is not None
    length = int(np.prod(content.item_shape))
    sequences, classes = make(num, num_codes=content.num_codes, length=length)

    # `write_samples` names the tokenizer inside an export
    (root / "export").mkdir()
    tokenizer.rename(root / "export" / "vqvae")
    write_samples(root / "tokens", sequences, classes, content, folder=root / "export")
    return root / "export" / "vqvae", root / "tokens"


def small_prior(shards: Path, folder: Path, **changes: object) -> PriorConfig:
    """A tiny run. Changes are values of `run`, or sections given as a dict."""
    values: dict[str, dict[str, object]] = {
        "tokens": {"tokens": [str(shards)]},
        "prior": {"width": 32, "depth": 1, "num_heads": 2, "dropout": 0.0},
        "optimizer": {"learning_rate": 1e-2, "lr_warmup_steps": 5, "ema_decay": 0.9},
        "run": {
            "output_dir": str(folder),
            "max_train_steps": 120,
            "train_batch_size": 16,
            "eval_batch_size": 64,
            "checkpointing_steps": 60,
            "validation_steps": 60,
            "log_steps": 20,
            "num_sample_images": 4,
            "mixed_precision": "no",
        },
    }
    for name, value in changes.items():
        if isinstance(value, dict):
            values[name] |= value
        else:
            values["run"][name] = value
    return PriorConfig.model_validate(values)
