"""Estimate the total correlation of a code by a discriminator, as FactorVAE does.

The source is Kim and Mnih 2018, arXiv:1802.05983, algorithm 2. The discriminator distinguishes
codes z ~ q(z) from codes whose dimensions were permuted within the batch. Permuted codes are
approximately samples of prod_k q(z_k). The difference of the discriminator's two logits, in the
mean over codes z, estimates the total correlation. The VAE and the discriminator are trained in
alternating steps:

    tc = density_ratio_tc(discriminator(z))               # z with its graph, discriminator frozen
    (recon + kl + gamma * tc).backward()                  # the VAE's step

    permuted = permute_dims(other_z)                      # of a second batch
    loss = factor_discriminator_loss(discriminator(z.detach()), discriminator(permuted.detach()))
    loss.backward()                                       # the discriminator's step

`B` batch, `D` dimensions of the code.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Width and number of layers of the paper, and TensorFlow's slope of the leaky ReLU.
WIDTH, LAYERS, SLOPE = 1000, 6, 0.2
JOINT, PERMUTED = 0, 1  # columns of the logits


class FactorDiscriminator(nn.Module):
    """A fully connected network that finds out whether the dimensions of codes were permuted.

    The input is codes (B, D). The output is two logits (B, 2): for codes as they are ("joint"), and
    for codes whose dimensions were permuted within the batch.

    Args:
        dimensions: number of dimensions D of a code.
        width: width of the hidden layers.
        layers: number of hidden layers, at least 1.
    """

    def __init__(self, dimensions: int, *, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        widths = [dimensions] + [width] * layers
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            parts += [nn.Linear(before, after), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*parts, nn.Linear(widths[-1], 2))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def permute_dims(z: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Return codes in which each dimension is permuted separately within the batch.

    Args:
        z: codes of D dimensions, (B, D).
        generator: random generator of the permutations, on the device of `z`. None uses torch's
            global generator.
    """
    order = torch.rand(z.shape, generator=generator, device=z.device).argsort(0)
    return z.gather(0, order)


def density_ratio_tc(logits: Tensor) -> Tensor:
    """Return the estimated total correlation, E[log(D(z) / (1 - D(z)))], a scalar in nats.

    D(z) is the discriminator's probability that the dimensions of code z were not permuted.

    Args:
        logits: the discriminator's logits (B, 2) of codes z that were not permuted.
    """
    logits = logits.float()
    return (logits[:, JOINT] - logits[:, PERMUTED]).mean()


def factor_discriminator_loss(joint_logits: Tensor, permuted_logits: Tensor) -> Tensor:
    """Return the mean cross-entropy of the discriminator, a scalar. Random guessing gives log 2.

    Args:
        joint_logits: logits (B, 2) of codes that were not permuted.
        permuted_logits: logits (B, 2) of permuted codes.
    """

    def cross_entropy(logits: Tensor, column: int) -> Tensor:
        return -F.log_softmax(logits.float(), dim=1)[:, column].mean()

    return 0.5 * (cross_entropy(joint_logits, JOINT) + cross_entropy(permuted_logits, PERMUTED))
