"""Use hooks to record which gradients reach which network, and the precision of convolutions."""

from typing import Any

import torch
from torch import Tensor, nn

from latentvae.tasks.autoencoder.task import AutoencoderTask

# In each batch (micro-step) the discriminator is called first for the model's loss, then for its
# own loss (and again for R1). A gradient before the discriminator's second call comes from the
# model's loss.
OWN_CALL = 2


class Watch:
    """Context manager that counts the gradients that reach the wrong network.

    Attributes:
        discriminator_calls: number of forward passes of the discriminator.
        on_discriminator: number of gradients of the model's loss on parameters of the
            discriminator.
        on_model: number of gradients of the discriminator's loss on parameters of the model.
        dtypes: output dtypes of the autoencoder's convolutions.
    """

    def __init__(self, task: AutoencoderTask) -> None:
        self.task = task
        self.discriminator_calls = self.on_discriminator = self.on_model = 0
        self.dtypes: set[torch.dtype] = set()
        self._calls = 0  # number of calls of the discriminator in this batch
        self._handles: list[Any] = []

    def next_micro_step(self) -> None:
        self._calls = 0

    def __enter__(self) -> "Watch":
        keep = self._handles.append
        for module in self.task.net.modules():
            if isinstance(module, nn.Conv2d):
                keep(module.register_forward_hook(self._convolution))
        self._watch(self.task.wrapper, self._model_got)
        if self.task.discriminator is not None:
            keep(self.task.discriminator.register_forward_hook(self._discriminator_called))
            self._watch(self.task.discriminator, self._discriminator_got)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, module: nn.Module, hook: Any) -> None:
        self._handles += [
            parameter.register_post_accumulate_grad_hook(hook)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]

    def _convolution(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.dtypes.add(output.dtype)

    def _discriminator_called(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.discriminator_calls += 1
        self._calls += 1

    def _model_got(self, parameter: Tensor) -> None:
        self.on_model += self._calls >= OWN_CALL

    def _discriminator_got(self, parameter: Tensor) -> None:
        self.on_discriminator += self._calls < OWN_CALL
