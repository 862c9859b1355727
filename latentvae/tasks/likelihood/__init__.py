"""Train a variational autoencoder by a bound of its likelihood: VAE, IWAE, hierarchical VAEs."""

from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.likelihood.task import LikelihoodTask

__all__ = ["LikelihoodConfig", "LikelihoodTask"]
