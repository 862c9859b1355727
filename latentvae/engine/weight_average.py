"""The moving average of the weights."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class WeightAverage(EMAModel):
    """diffusers' `EMAModel`, each step of which reads and writes every weight once.

    Its own step forms the difference first, for which all weights go through memory three times.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        self.optimization_step += 1
        decay = self.get_decay(self.optimization_step)
        self.cur_decay_value = decay
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1.0 - decay)
