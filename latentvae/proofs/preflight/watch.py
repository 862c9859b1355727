"""Who gets a gradient from whom, and in which precision: hooks on a run while it makes updates."""

from typing import Any

import torch
from torch import Tensor, nn

from latentvae.tasks.autoencoder.task import AutoencoderTask

# In each micro-step the critic is called first for the model's part, then for its own (and again
# for R1): what reaches a parameter before its second call is of the model's part.
OWN_CALL = 2


class Watch:
    """Counts gradients that arrive where they should not, while it is entered.

    Attributes:
        critic_calls: forward passes of the critic.
        on_critic: gradients that the model's part left on parameters of the critic.
        on_model: gradients that the critic's part left on parameters of the model.
        dtypes: what the network's convolutions gave out.
    """

    def __init__(self, task: AutoencoderTask) -> None:
        self.task = task
        self.critic_calls = self.on_critic = self.on_model = 0
        self.dtypes: set[torch.dtype] = set()
        self._calls = 0  # of the critic in this micro-step
        self._handles: list[Any] = []

    def next_micro_step(self) -> None:
        self._calls = 0

    def __enter__(self) -> "Watch":
        keep = self._handles.append
        for module in self.task.net.modules():
            if isinstance(module, nn.Conv2d):
                keep(module.register_forward_hook(self._convolution))
        self._watch(self.task.wrapper, self._model_got)
        if self.task.critic is not None:
            keep(self.task.critic.register_forward_hook(self._critic_called))
            self._watch(self.task.critic, self._critic_got)
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

    def _critic_called(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.critic_calls += 1
        self._calls += 1

    def _model_got(self, parameter: Tensor) -> None:
        self.on_model += self._calls >= OWN_CALL

    def _critic_got(self, parameter: Tensor) -> None:
        self.on_critic += self._calls < OWN_CALL
