"""The training loop and its parts. `train(config)` is the door; `TrainConfig` the schema."""

from latentvae.config.autoencoder import TrainConfig
from latentvae.config.presets import load_preset

__all__ = ["TrainConfig", "load_preset", "train"]


def train(config: TrainConfig) -> str:
    """Run the job that ``config`` describes; returns the path of the export. See
    `latentvae.tasks.autoencoder.loop`."""
    from latentvae.tasks.autoencoder.loop import train as run

    return str(run(config))
