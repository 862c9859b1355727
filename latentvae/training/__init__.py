"""The training loop and its parts. `train(config)` is the door; `TrainConfig` the schema."""

from latentvae.training.config import TrainConfig
from latentvae.training.presets import load_preset

__all__ = ["TrainConfig", "load_preset", "train"]


def train(config: TrainConfig) -> str:
    """Run the job that ``config`` describes; returns the path of the export. See
    `latentvae.training.loop`."""
    from latentvae.training.loop import train as run

    return str(run(config))
