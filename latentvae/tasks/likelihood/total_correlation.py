"""Estimate the total correlation of latents, from the posteriors of a batch or by a discriminator.

The total correlation is KL(q(z) || product of q(z_j)), where z_j are the units of the latents z.
The total correlation is 0 if the units are independent.

Symbols: `B` batch, `U` latent units.
"""

from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentvae.config.run_config import OptimizerConfig
from latentvae.distributed import gather_with_gradient
from latentvae.engine.task import Learner
from latentvae.losses.factor_vae import (
    FactorDiscriminator,
    density_ratio_tc,
    factor_discriminator_loss,
    permute_dims,
)
from latentvae.losses.total_correlation import split_kl
from latentvae.losses.variational import VariationalConfig
from latentvae.models.bound import Bound

DISCRIMINATOR_BETAS = 0.5, 0.9  # the paper's (arXiv:1802.05983, appendix A)


class TotalCorrelation(Protocol):
    """An estimate of the total correlation of the latents of a batch."""

    def of(self, bound: Bound) -> Tensor:
        """Return the total correlation in nats, a scalar with its autograd graph."""
        ...

    def learn(self, bound: Bound, *, share: float) -> dict[str, Tensor]:
        """Add the gradients of the network that makes the estimate (if any), times `share`.

        Return values to log, or {} if the estimate needs no network.
        """
        ...


class BatchEstimate:
    """The total correlation as in beta-TCVAE, computed from all posteriors of a batch.

    Args:
        num_images: number of training images.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def of(self, bound: Bound) -> Tensor:
        assert bound.latents is not None and bound.posterior is not None
        own = (bound.latents[0][0], *bound.posterior)
        z, mean, logvar = (gather_with_gradient(values) for values in own)  # values of all ranks
        return split_kl(z, mean, logvar, num_images=self.num_images).total_correlation.mean()

    def learn(self, bound: Bound, *, share: float) -> dict[str, Tensor]:
        return {}


class DiscriminatorEstimate:
    """The total correlation as in FactorVAE, by a discriminator that learns together with the VAE.

    The discriminator learns to distinguish latents from latents with units permuted over the batch.
    One half of the batch gives the unchanged latents, and the other half the permuted latents.

    Args:
        learner: the discriminator and its optimizer.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def of(self, bound: Bound) -> Tensor:
        # The discriminator is constant here.
        weights = {n: p.detach() for n, p in self.learner.module.named_parameters()}
        logits = torch.func.functional_call(self.learner.module, weights, (self._codes(bound),))
        return density_ratio_tc(logits)

    def learn(self, bound: Bound, *, share: float) -> dict[str, Tensor]:
        joint, other = self._codes(bound).detach().chunk(2)
        permuted = permute_dims(other)
        logits = self.learner.prepared(torch.cat([joint, permuted]))
        loss = factor_discriminator_loss(logits[: len(joint)], logits[len(joint) :])
        (loss * share).backward()
        return {"loss/tc_discriminator": loss.detach()}

    @staticmethod
    def _codes(bound: Bound) -> Tensor:
        assert bound.latents is not None
        return bound.latents[0][0]


def build_discriminator(
    units: int, options: VariationalConfig, optimizer: OptimizerConfig, accelerator: Accelerator
) -> Learner:
    """Return the discriminator of FactorVAE as a learner."""
    beta1, beta2 = DISCRIMINATOR_BETAS
    own = optimizer.model_copy(
        update={"adam_beta1": beta1, "adam_beta2": beta2, "adam_weight_decay": 0.0}
    )
    module: nn.Module = FactorDiscriminator(units, width=options.tc_channels)
    return Learner.with_optimizer(module, accelerator, own, rate=options.tc_learning_rate)
