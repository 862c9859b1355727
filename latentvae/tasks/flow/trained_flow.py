"""Define the module that training calls, and the loss of flow matching.

Symbols: `B` batch, `d` latent channels, `h w` height and width of latents.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.priors.dit import Condition, velocity
from latentvae.priors.flow_matching import noised


class TrainedFlow(nn.Module):
    """The network with its loss: `forward` returns the mean squared error, a scalar.

    Accelerate replaces the method `forward` of a module that it prepares, to compute in mixed
    precision. Accelerate prepares `TrainedFlow`, and not the network inside. So validation, which
    calls the network itself, computes in float32.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, noise: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return flow_loss(self.net, x, noise, sigma, condition).mean()


def flow_loss(
    net: nn.Module, x: Tensor, noise: Tensor, sigma: Tensor, condition: Condition
) -> Tensor:
    """Return the mean squared error of the predicted velocity for each image, (B,), float32.

    Args:
        net: the DiT or PixArt network.
        x: normalised latents, (B, d, h, w).
        noise: standard normal noise, (B, d, h, w).
        sigma: noise level of each image in [0, 1], (B,).
        condition: classes (B,) or encoded texts, see `velocity`.
    """
    predicted = velocity(net, noised(x, noise, sigma), sigma, condition)
    errors = F.mse_loss(predicted.float(), noise - x, reduction="none")
    return errors.mean(dim=(1, 2, 3))
