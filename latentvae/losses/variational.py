"""The loss of a variational autoencoder: a bound of ln p(x), and the forms of its KL term.

Every value is in nats per image. The loss is the negative of one of three bounds:

- the ELBO of Kingma and Welling (arXiv:1312.6114)
- the importance-weighted bound of Burda et al. (IWAE, arXiv:1509.00519)
- the importance-weighted bound with the doubly reparameterised gradient of Tucker et al. (DReG,
  arXiv:1810.04152)

Symbols: `B` batch, `S` samples per image, `G` groups of latents.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from latentvae.distributed import all_reduce_mean
from latentvae.option_marks import Elsewhere, Positive, Section, UpdatesOrShare, Weight


class VariationalConfig(Section):
    """Options of the loss of a variational autoencoder."""

    bound: Annotated[Literal["elbo", "iwae", "dreg"], Elsewhere("objective loss")] = Field(
        default="elbo",
        description=(
            "Lower bound of the log-likelihood ln p(x) that is maximised. `elbo` is the bound of "
            "the VAE. `iwae` is the importance-weighted bound, which is tighter with more "
            "train_samples. `dreg` is the same bound as `iwae`, but the gradient of the encoder "
            "has less noise."
        ),
    )
    train_samples: Annotated[Positive, Elsewhere("num_samples k iwae_samples")] = Field(
        default=1, description="Number of latent samples for each image in training."
    )
    kl_scale: Annotated[Weight, Elsewhere("beta kl_weight")] = Field(
        default=1.0,
        description=(
            "Weight of the KL term (beta of the beta-VAE). With a weight above 1, the loss is a "
            "looser bound of the log-likelihood ln p(x). With a weight below 1, the loss is no "
            "bound of ln p(x). Validation always reports the bound with weight 1."
        ),
    )
    kl_warmup_steps: UpdatesOrShare = Field(
        default=0,
        description=(
            "Number of updates over which the weight of the KL grows linearly from 0 to kl_scale. "
            "A value between 0 and 1 is a fraction of the whole training (max_train_steps)."
        ),
    )
    kl_cycles: Positive = Field(
        default=1,
        description=(
            "Number of cycles: the training is divided into this many equal parts. In the first "
            "kl_warmup_steps updates of each cycle, the weight of the KL grows from 0 to kl_scale. "
            "With one cycle, the weight grows only once."
        ),
    )
    free_nats: Weight = Field(
        default=0.0,
        description=(
            "Lower limit for the KL of each group of latents, in nats per image (free bits). The "
            "loss does not push a group's mean KL below free_nats. 0 means no lower limit."
        ),
    )
    kl_balance: bool = Field(
        default=False,
        description=(
            "During the KL warm-up, give each group of latents its own weight in the KL term, as "
            "NVAE does. The weight is proportional to the group's KL per latent value. So the KL "
            "of a group that carries little information is pushed down less, and the group does "
            "not collapse early."
        ),
    )
    capacity_nats: Weight = Field(
        default=0.0,
        description=(
            "Value that the KL should have, in nats per image (the capacity C of the latents). The "
            "KL term is then kl_scale * |KL - C|, so the KL moves towards C. 0 turns this option "
            "off."
        ),
    )
    capacity_steps: UpdatesOrShare = Field(
        default=0,
        description=(
            "Number of updates over which capacity_nats grows from 0 to its value. A value between "
            "0 and 1 is a fraction of the whole training (max_train_steps)."
        ),
    )

    spectral_scale: Weight = Field(
        default=0.0,
        description=(
            "Weight of the spectral penalty of NVAE: the sum of the largest singular values of all "
            "convolutions. The penalty keeps deep networks stable. NVAE uses a weight of 0.01 to "
            "0.1, for a loss in nats per image as in this project. 0 turns the spectral penalty "
            "off."
        ),
    )
    tc_scale: Annotated[Weight, Elsewhere("gamma tc_weight")] = Field(
        default=0.0,
        description=(
            "Weight of an additional loss term, the total correlation of the latent units, which "
            "measures how much the units depend on each other. This weight is called gamma in "
            "FactorVAE, and it equals beta - 1 in beta-TCVAE. 0 leaves the total "
            "correlation out of the loss."
        ),
    )
    tc_estimate: Literal["discriminator", "minibatch"] = Field(
        default="discriminator",
        description=(
            "How the total correlation is estimated (see tc_scale). `discriminator` trains a "
            "second network, as FactorVAE does. `minibatch` uses the posteriors of the batch, as "
            "beta-TCVAE does."
        ),
    )
    tc_channels: Positive = Field(
        default=1000,
        description=(
            "Width of the six hidden layers of the discriminator that estimates the total "
            "correlation (see tc_estimate). The default is the width in FactorVAE."
        ),
    )
    tc_learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-4,
        description=(
            "Learning rate of the discriminator that estimates the total correlation (see "
            "tc_estimate)."
        ),
    )

    label_scale: Annotated[Weight, Elsewhere("alpha")] = Field(
        default=0.5,
        description=(
            "Weight of the classifier's cross entropy on images with a label, for the architecture "
            "`classes`. This weight is called alpha in the paper of M2 (a semi-supervised VAE, "
            "arXiv:1406.5298). In the paper of M2, this weight is 0.1 if the loss is a mean over "
            "images, as in this project."
        ),
    )
    class_floor: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.1,
        description=(
            "For an image without a label, the loss sums over the possible classes. To save time, "
            "the sum leaves out classes whose predicted probability is below class_floor divided "
            "by the number of classes. With 0, the loss sums over all classes. This option is for "
            "the architecture `classes`."
        ),
    )
    label_warmup_steps: UpdatesOrShare = Field(
        default=0,
        description=(
            "Number of updates at the start that use only images with a label, for the "
            "architecture `classes`. A value between 0 and 1 is a fraction of the whole training "
            "(max_train_steps)."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "VariationalConfig":
        changed = [n for n in ("free_nats", "capacity_nats", "kl_balance") if getattr(self, n)]
        if self.bound != "elbo" and (self.kl_scale != 1.0 or self.kl_warmup_steps or changed):
            name = (
                changed[0] if changed else "kl_scale" if self.kl_scale != 1.0 else "kl_warmup_steps"
            )
            raise ValueError(
                f"{name} {getattr(self, name)} changes the KL, but bound {self.bound} has no "
                f"separate KL. Use bound elbo, or leave {name} out."
            )
        if self.bound == "dreg" and self.train_samples == 1:
            raise ValueError("bound dreg needs train_samples of at least 2 (got 1).")
        if self.free_nats and self.capacity_nats:
            raise ValueError(
                f"free_nats {self.free_nats:g} and capacity_nats {self.capacity_nats:g} both "
                "replace the KL term. Give only one."
            )
        if self.tc_scale and (self.bound != "elbo" or self.train_samples > 1):
            raise ValueError(
                f"tc_scale {self.tc_scale:g} needs bound elbo and train_samples 1 (got "
                f"{self.bound} and {self.train_samples})."
            )

        if self.kl_balance and not self.kl_warmup_steps:
            raise ValueError(
                "kl_balance works during the KL warm-up only. Give kl_warmup_steps above 0."
            )
        if self.kl_balance and (self.free_nats or self.capacity_nats):
            name = "free_nats" if self.free_nats else "capacity_nats"
            raise ValueError(
                f"kl_balance and {name} {getattr(self, name):g} both change the KL of the groups. "
                "Give only one."
            )
        if self.capacity_steps and not self.capacity_nats:
            raise ValueError(
                f"capacity_steps {self.capacity_steps} has no effect without capacity_nats."
            )
        if self.kl_cycles > 1 and not self.kl_warmup_steps:
            raise ValueError(
                f"kl_cycles {self.kl_cycles} repeats the growth of the KL's weight, so it needs "
                "kl_warmup_steps above 0."
            )
        return self


class BoundParts(Protocol):
    """The parts of a variational bound that the loss needs, see `models.bound.Bound`."""

    log_likelihood: Tensor
    kl: Tensor
    log_ratio: Tensor
    latents: tuple[Tensor, ...] | None

    def log_weights(self) -> Tensor: ...
    def importance(self) -> Tensor: ...


class VariationalLoss:
    """Compute the negative variational bound that the options choose.

        loss, values = VariationalLoss(options, total=10_000)(bound, update=0)

    Args:
        options: options for the bound, and for the form and weight of the KL term.
        total: length of the training in updates.
        group_sizes: number of latent values in each group of latents, for the option `kl_balance`.
    """

    def __init__(
        self, options: VariationalConfig, *, total: int, group_sizes: Sequence[int] = ()
    ) -> None:
        self.options = options
        self.total = total
        self.group_sizes = group_sizes

    @property
    def detaches_posterior(self) -> bool:
        """Whether the network must compute `Bound.log_ratio` with detached posterior parameters."""
        return self.options.bound == "dreg"

    def __call__(self, out: BoundParts, *, update: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar, and values to log, in nats per image.

        Args:
            out: parts of the variational bound for a batch of images.
            update: number of updates done.
        """
        reported = {
            "loss/distortion": -out.log_likelihood.detach().mean(),
            "loss/kl": out.kl.detach().sum(0).mean(),
        }
        if self.options.bound == "elbo":
            loss = -out.log_likelihood.mean() + self._kl_term(out.kl, update)
        elif self.options.bound == "iwae":
            loss = -out.importance().mean()
        else:
            loss = doubly_reparameterised(out)
        return loss, reported | {"loss/total": loss.detach()}

    def kl_weight(self, update: int) -> float:
        """Return the weight of the KL term in update number `update`, counted from 0."""
        options = self.options
        if not options.kl_warmup_steps:
            return options.kl_scale
        cycle = math.ceil(self.total / options.kl_cycles)
        return options.kl_scale * min(update % cycle / options.kl_warmup_steps, 1.0)

    def _kl_term(self, kl: Tensor, update: int) -> Tensor:
        """Return the weighted KL term, a scalar.

        Args:
            kl: KL of G groups of latents, for S samples of each of B images, (G, S, B).
            update: number of updates done.
        """
        options, weight = self.options, self.kl_weight(update)
        groups = kl.flatten(1).mean(1)
        if options.free_nats:
            return weight * floored(groups, options.free_nats)
        if options.capacity_nats:
            target = options.capacity_nats
            if options.capacity_steps:
                target *= min(update / options.capacity_steps, 1.0)
            return weight * distance(groups.sum(), target)
        if options.kl_balance and weight < options.kl_scale:
            groups = groups * balance(groups, self.group_sizes)
        return weight * groups.sum()


def floored(groups: Tensor, floor: float) -> Tensor:
    """Return sum_g max(floor, KL_g) over groups g (free bits, arXiv:1606.04934, equation 15).

    Args:
        groups: mean KL of each group of latents on this rank, in nats, one value per group.
        floor: smallest value of a group's term, in nats. The mean KL over all ranks is compared
            with the floor, so that several ranks give the same result as one rank.
    """
    above = all_reduce_mean(groups.detach()) > floor
    return torch.where(above, groups, floor).sum()


def distance(kl: Tensor, target: float) -> Tensor:
    """Return |kl - target| in nats, for a scalar KL (Burgess et al., arXiv:1804.03599, eq. 8).

    With several ranks, the mean of the results over ranks is |mean of kl over ranks - target|.
    """
    side = torch.sign(all_reduce_mean(kl.detach()) - target)
    return side * (kl - target)


def balance(groups: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a weight for the KL of each group, in proportion to the group's KL per latent value.

    The mean of the weights is 1. As in the code of NVAE, the KL is divided by the size of the
    group. In the paper on NVAE (arXiv:2007.03898, appendix A), the KL is multiplied by the size of
    the group. The author calls this multiplication an error (github.com/NVlabs/NVAE/issues/26).

    Args:
        groups: mean KL of each group of latents on this rank, in nats, one value per group.
        sizes: number of latent values in each group.
    """
    share = all_reduce_mean(groups.detach()).abs() + 0.01
    share = share / torch.tensor(sizes).to(share)
    return share / share.mean()


def doubly_reparameterised(out: BoundParts) -> Tensor:
    """Return the negative IWAE bound of the batch, with the doubly reparameterised gradient (DReG).

    The importance weights of the samples are treated as constants. In the decoder's gradient, each
    sample is multiplied by its normalised weight. In the encoder's gradient, each sample is
    multiplied by the square of its normalised weight (arXiv:1810.04152, equation 8).

    Args:
        out: parts of a bound with one group of latents. `out.log_ratio` must be computed with
            detached parameters of the posterior.
    """
    assert out.latents is not None and len(out.latents) == 1
    weights = out.log_weights()  # (S, B)
    shares = weights.detach().softmax(0)
    (z,) = out.latents
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * shares.unsqueeze(-1))

    surrogate = -(shares * weights).sum(0).mean()
    value = -out.importance().detach().mean()
    return surrogate + (value - surrogate.detach())
