"""Latent shards for tests of flows: two classes of constant latents, which a tiny DiT learns."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from latentvae.latents.encode import encode_folder
from latentvae.latents.finishing import finish
from latentvae.latents.formats.shards import ShardHeader
from latentvae.latents.shard_dataset import ShardReader
from latentvae.latents.writing import save_shard
from latentvae.tasks.flow.config import LatentFlowConfig
from tests.tasks.prior.tokens import pictures
from tests.tiny import kl

SCALE = 0.5  # of the autoencoder: normalised latents are latents times this


def constant_latents(num: int) -> tuple[Tensor, Tensor]:
    """Latents (n, 4, 4, 4) of unit variance after scaling: about +1 in class 0, -1 in class 1."""
    draws = torch.Generator().manual_seed(0)
    classes = torch.arange(num) % 2
    sign = 1.0 - 2 * classes.view(-1, 1, 1, 1)
    z = sign + 0.1 * torch.randn(num, 4, 4, 4, generator=draws)
    return (z / SCALE).half(), classes


def write_latents(root: Path, *, num: int = 128, moments: bool = False) -> tuple[Path, Path]:
    """Write an autoencoder, and shards of constant latents as if they were its. Return both."""
    autoencoder = root / "autoencoder"
    net = kl(latent_channels=4)
    net.register_to_config(scaling_factor=SCALE)
    net.save_pretrained(autoencoder)
    options = {"resolution": 8, "moments": moments}
    encode_folder(autoencoder, pictures(root / "photos"), root / "encoded", **options)
    reader = ShardReader(root / "encoded")
    tensors = load_file(root / "encoded" / "shard-00000.safetensors")

    z, classes = constant_latents(num)
    changes = {"num_source_items": num, "item_shape": tuple(z.shape[1:]), "data_sha256": "0" * 64}
    content = reader.content.model_copy(update=changes)
    parts = {"latents": z, "labels": classes, "sizes": tensors["sizes"][:1].repeat(num, 1)}
    if moments:
        parts["stds"] = torch.full_like(z, 0.2)
    (root / "latents").mkdir()
    header = ShardHeader(content=content, shard=0, unreadable=[])
    save_shard(root / "latents", header, parts, names=[f"{i:05d}" for i in range(num)])
    finish(root / "latents", content, model=str(autoencoder), data="none", rank=0)
    return autoencoder, root / "latents"


def small_flow(shards: Path, folder: Path, **changes: object) -> LatentFlowConfig:
    """A tiny run. Changes are values of `run`, or sections given as a dict."""
    values: dict[str, dict[str, object]] = {
        "latents": {"latents": [str(shards)], "validation_share": 0.2},
        "flow": {"width": 32, "depth": 1, "head_dim": 16, "sampling_steps": 8},
        "optimizer": {"learning_rate": 1e-2, "lr_warmup_steps": 5, "ema_decay": 0.9},
        "run": {
            "output_dir": str(folder),
            "max_train_steps": 200,
            "train_batch_size": 16,
            "eval_batch_size": 64,
            "checkpointing_steps": 100,
            "validation_steps": 100,
            "log_steps": 50,
            "num_sample_images": 4,
            "mixed_precision": "no",
        },
    }
    for name, value in changes.items():
        if isinstance(value, dict):
            values[name] |= value
        else:
            values["run"][name] = value
    return LatentFlowConfig.model_validate(values)
