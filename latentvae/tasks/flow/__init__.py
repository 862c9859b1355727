"""Train a flow matching model: a generator of the latents that an autoencoder makes of images."""

from latentvae.tasks.flow.config import LatentFlowConfig
from latentvae.tasks.flow.task import FlowTask

__all__ = ["FlowTask", "LatentFlowConfig"]
