"""Keep the exponential moving average of weights."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from latentvae.compute.compilation import not_compiled


class WeightAverage(EMAModel):
    """diffusers' `EMAModel` with a faster step, in which all weights pass through memory once.

    The step of diffusers first computes the difference between each average and its weight. So in
    that step, all weights pass through memory three times.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move each average towards the current value of its weight."""
        self.optimization_step += 1
        decay = self.get_decay(self.optimization_step)
        self.cur_decay_value = decay
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1.0 - decay)


@contextlib.contextmanager
def averaged_weights(net: nn.Module, average: EMAModel | None) -> Iterator[None]:
    """Put the averaged weights into `net` inside the context, in eval mode and not compiled.

    If `average` is None, the trained weights stay. Buffers are not replaced, because the buffers of
    a codebook are already moving averages.
    """
    # to eval mode and averaged weights
    training = [module for module in net.modules() if module.training]
    parameters = list(net.parameters())
    net.eval()
    if average is not None:
        average.store(parameters)
        average.copy_to(parameters)

    # and back
    try:
        with not_compiled():
            yield
    finally:
        if average is not None:
            average.restore(parameters)
        for module in training:
            module.training = True
