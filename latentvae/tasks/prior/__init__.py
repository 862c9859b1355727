"""Train a prior: a generator of the tokens that a tokenizer makes of images."""

from latentvae.tasks.prior.config import PriorConfig
from latentvae.tasks.prior.task import PriorTask

__all__ = ["PriorConfig", "PriorTask"]
