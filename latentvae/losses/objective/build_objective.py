"""Build the model's loss (the objective) from the options."""

from collections.abc import Mapping

import torch
from torch import nn

from latentvae.losses.discriminator_config import DiscriminatorConfig
from latentvae.losses.objective.adversarial_weight import adversarial_weight
from latentvae.losses.objective.kl_forms import WarmUp, kl_form
from latentvae.losses.objective.kl_target import kl_target
from latentvae.losses.objective.objective import Likelihood, Objective
from latentvae.losses.objective_config import ObjectiveConfig


def build_objective(
    options: ObjectiveConfig,
    discriminator: DiscriminatorConfig,
    *,
    perceptual: nn.Module | None,
    latent_weights: Mapping[str, float],
    has_kl: bool,
    features: nn.Module | None = None,
    likelihood: Likelihood | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> Objective:
    """Return the model's loss (the objective) with the terms and weights that the options choose.

    Args:
        options: options of the model's loss.
        discriminator: options of the adversarial term.
        perceptual: LPIPS, which is not used if the option `perceptual_scale` is 0.
        latent_weights: weights of the bottleneck's losses by name, see `Latent.losses`.
        features: the frozen network for the option `feature_loss`, if this option is used.
        has_kl: whether the network's latents have a KL to a prior.
        likelihood: the network's own likelihood, if it has one.
        autocast_dtype: see `Objective`.
    """

    return Objective(
        rec_loss=options.rec_loss,
        perceptual=perceptual if options.perceptual_scale > 0 else None,
        perceptual_scale=options.perceptual_scale,
        features=features,
        feature_scale=options.feature_scale,
        logit_laplace_scale=options.logit_laplace_scale,
        kl_scale=options.kl_scale if has_kl else None,
        latent_weights=latent_weights,
        kl_form=kl_form(options),
        kl_factor=kl_target(options) or WarmUp(options.kl_warmup_steps),
        adversarial=adversarial_weight(discriminator),
        likelihood=likelihood,
        autocast_dtype=autocast_dtype,
    )
