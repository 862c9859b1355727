"""The module that training calls: a network with additions that only training needs."""

from typing import Any

import torch
from torch import Tensor, nn

from latentvae.models.low_rank import trained_weight


class TrainingWrapper(nn.Module):
    """A network with the additions that only training needs.

    Each kind of network has a subclass of `TrainingWrapper` with the method
    `forward(images, *, sample, temperature) -> AutoencoderOutput`.

    Args:
        net: the autoencoder, which is exported without the wrapper.
        output_logvar: initial log-variance of the output likelihood (natural logarithm).
        learn_logvar: whether the log-variance is a trained parameter. If `learn_logvar` is False,
            the log-variance is a constant.
    """

    def __init__(self, net: Any, *, output_logvar: float = 0.0, learn_logvar: bool = False) -> None:
        super().__init__()
        self.net: Any = net
        value = torch.tensor(float(output_logvar))
        if learn_logvar:
            self.output_logvar = nn.Parameter(value)
        else:
            self.register_buffer("output_logvar", value)

    def averaged(self) -> nn.Module:
        """Return the module whose weights are averaged over the training steps (EMA).

        The output's log-variance is not averaged.
        """
        return self.net

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients set the adaptive weight of the adversarial loss.

        See equation 7 of arXiv:2012.09841.
        """
        return trained_weight(self.net.decoder.conv_out)


def keep_batch_statistics(net: nn.Module) -> None:
    """Put the batch norms of a pretrained network in eval mode, so that they keep their statistics.

    In train mode, the statistics would follow small batches, and would differ between processes.
    """
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
