"""Train with noise that depends only on the image, so that any number of processes draws the same.

python -m tests.tasks.flow.fixed_noise CONFIG.yaml
"""

import sys

import torch
from torch import Tensor

from latentvae.config.presets import load_preset
from latentvae.engine.loop import train
from latentvae.priors.flow_matching import noise_of
from latentvae.tasks.flow.config import LatentFlowConfig
from latentvae.tasks.flow.latents import Batch
from latentvae.tasks.flow.task import FlowTask


class FixedNoise(FlowTask):
    def draw(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        noise = noise_of(x.shape[1:], seed=0, numbers=batch.numbers)
        return noise, (torch.tensor(batch.numbers) % 9 + 0.5) / 10


if __name__ == "__main__":
    train(FixedNoise(load_preset(sys.argv[1], LatentFlowConfig)))
