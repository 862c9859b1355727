"""Train with posterior samples that depend only on the image, on any number of processes.

python -m tests.tasks.likelihood.fixed_noise CONFIG.yaml
"""

import sys
from unittest.mock import patch

import torch
from torch import Tensor

from latentvae.config.presets import load_preset
from latentvae.engine.loop import train
from latentvae.models.dense.gaussians import Gaussian
from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.likelihood.task import LikelihoodTask


def fixed_sample(self: Gaussian, *, count: int | None = None) -> Tensor:
    """Noise that is a function of the posterior itself."""
    noise = torch.sin(1e3 * self.mean.detach())
    drawn = self.mean + (0.5 * self.logvar).exp() * noise
    return drawn if count is None else drawn.expand(count, *self.mean.shape)


def train_fixed(config: LikelihoodConfig) -> None:
    with patch.object(Gaussian, "sample", fixed_sample):
        train(LikelihoodTask(config))


if __name__ == "__main__":
    train_fixed(load_preset(sys.argv[1], LikelihoodConfig))
