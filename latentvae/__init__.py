"""Train, measure and ship the autoencoder of a latent generative model.

import latentvae

config = latentvae.load_preset("kl_small")
config.data.train_data_dir, config.run.output_dir = "photos", "runs/first"
export = latentvae.train(config)  # or train/train_kl.py
model = latentvae.load("runs/first/export")
z = model.encode(photo)
photo = model.decode(z, size=photo.size[::-1], output_type="pil")[0]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentvae.autoencoder import Autoencoder, load
    from latentvae.latents.shard_dataset import LatentDataset, TokenDataset
    from latentvae.tasks.autoencoder import TrainConfig, load_preset, train

__version__ = "0.1.0"
__all__ = [
    "Autoencoder",
    "LatentDataset",
    "TokenDataset",
    "TrainConfig",
    "__version__",
    "load",
    "load_preset",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `import latentvae` does not load torch."""
    from importlib import import_module

    homes = {"Autoencoder": "autoencoder", "load": "autoencoder"}
    homes |= dict.fromkeys(["LatentDataset", "TokenDataset"], "latents.shard_dataset")
    if name not in __all__:
        raise AttributeError(f"module 'latentvae' has no attribute '{name}'")
    return getattr(import_module(f"latentvae.{homes.get(name, 'tasks.autoencoder')}"), name)
