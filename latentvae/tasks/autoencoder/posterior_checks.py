"""Check the options of a Gaussian posterior against the options of the loss and the run."""

import math

from latentvae.losses.objective_config import ObjectiveConfig, PlacesKL
from latentvae.models.posterior import PosteriorConfig
from latentvae.option_marks import marked


def check_posterior(
    model: PosteriorConfig, objective: ObjectiveConfig, deterministic_posterior: bool
) -> None:
    """Check that the options of the posterior's variance and flow fit the other options.

    Args:
        model: options of the network.
        objective: options of the loss.
        deterministic_posterior: whether training decodes the posterior's mean.

    Raises:
        ValueError: two options exclude each other, or an option has no effect. The message names
            the options and their values.
    """
    if model.posterior_flow:
        _check_flow(model.posterior_flow, objective)
    if model.posterior_logvar is not None:
        _check_variance(model, objective)

    given = {"posterior_logvar": model.posterior_logvar, "posterior_flow": model.posterior_flow}
    for name, value in given.items():
        if deterministic_posterior and value != PosteriorConfig.model_fields[name].default:
            raise ValueError(
                f"{name} {value:g} and deterministic_posterior exclude each other, because "
                f"{name} needs samples of the posterior. Leave {name} or deterministic_posterior "
                "out."
            )


def _check_flow(layers: int, objective: ObjectiveConfig) -> None:
    if objective.kl_scale == 0:
        raise ValueError(
            f"posterior_flow {layers} learns only from the KL, but kl_scale is 0. Give a kl_scale "
            "above 0, or leave posterior_flow out."
        )
    if objective.free_bits:
        raise ValueError(
            f"free_bits {objective.free_bits:g} limits the KL of each channel, but posterior_flow "
            f"{layers} mixes the channels. Use kl_capacity, kl_target or rec_target instead."
        )


def _check_variance(model: PosteriorConfig, objective: ObjectiveConfig) -> None:
    """Check that a fixed posterior variance lets the KL fall to its target or limit."""
    floor = model.kl_floor / math.log(2.0)
    for name in marked(ObjectiveConfig, PlacesKL):
        value = getattr(objective, name)
        if name != "rec_target" and value and value <= floor:
            raise ValueError(
                f"{name} {value:g} has no effect with posterior_logvar "
                f"{model.posterior_logvar:g}: the KL is never below {floor:.3g} bits per latent "
                f"element. Give a larger {name}, or a posterior_logvar nearer to 0."
            )
