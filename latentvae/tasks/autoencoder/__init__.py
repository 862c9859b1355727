"""Train an autoencoder by `train(config)`, with options of the class `TrainConfig`."""

from pathlib import Path

from latentvae.tasks.autoencoder.config import TrainConfig, load_preset

__all__ = ["TrainConfig", "load_preset", "train"]


def train(config: TrainConfig) -> Path:
    """Train, validate and export an autoencoder. Return the export's folder.

    See `engine.loop.train`.
    """
    from latentvae.engine import loop
    from latentvae.tasks.autoencoder.task import AutoencoderTask

    return loop.train(AutoencoderTask(config))
