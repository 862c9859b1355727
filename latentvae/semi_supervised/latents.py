"""Train or load the VAE whose latents the methods M1 and M1+M2 classify (arXiv:1406.5298).

Symbols: `N` rows, `F` columns, `U` latent units.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.models.dense.gaussians import Gaussian
from latentvae.models.dense.network import VectorVAE
from latentvae.models.likelihood_models import load_likelihood_net
from latentvae.semi_supervised.rows import READ_ROWS, RowImages, row_distribution
from latentvae.semi_supervised.training import Schedule, train_vae

ACTIVE = 0.1  # smallest std of an active unit's posterior mean, over rows


def new_vae(columns: int, *, likelihood: str, units: int, hidden: int, layers: int) -> VectorVAE:
    """Return an untrained VAE of dense layers for rows with `columns` columns."""
    net = VectorVAE(
        image_channels=1,
        image_height=1,
        image_width=columns,
        latent_units=(units,),
        hidden_channels=(hidden,),
        hidden_layers=layers,
        activation="silu",
        likelihood=likelihood,
    )
    net.pixels = row_distribution(likelihood)
    return net


def fitted_vae(net: VectorVAE, images: RowImages, rows: Tensor, schedule: Schedule) -> VectorVAE:
    """Train a VAE on rows (N, F), and return the VAE."""
    net.start_at(images.images(rows.mean(0, keepdim=True))[0])
    train_vae(net, lambda picked: images.drawn(rows[picked]), count=len(rows), schedule=schedule)
    return net


def given_vae(path: str | Path, *, likelihood: str) -> VectorVAE:
    """Load a VAE that `latentvae train-vae` exported, for rows in [0, 1].

    Raises:
        UserError: there is no such VAE, the VAE's posterior is not a single Gaussian vector, or
            `likelihood` is not "bernoulli".
    """
    if likelihood != "bernoulli":
        raise UserError(
            f"vae='{path}' takes images in [0, 1], so likelihood must be 'bernoulli' (got "
            f"{likelihood!r})."
        )
    net: Any = load_likelihood_net(path)[0]
    if net.num_groups > 1 or net.posterior_moments(torch.zeros(1, *net.image_shape)) is None:
        raise UserError(
            f"the posterior of vae='{path}' is not one Gaussian vector; train one with a single "
            "entry in latent_units and posterior_flow none."
        )
    return net


def check_columns(net: VectorVAE, columns: int) -> None:
    """Check that rows of F columns can be reshaped to images for the VAE `net`.

    Raises:
        UserError: an image that the VAE takes does not have F values.
    """
    if math.prod(net.image_shape) != columns:
        shape = " x ".join(map(str, net.image_shape))
        raise UserError(
            f"vae takes images of {shape} = {math.prod(net.image_shape)} values, but X has "
            f"{columns} columns."
        )


@torch.no_grad()
def posteriors(net: VectorVAE, images: RowImages, rows: Tensor) -> Gaussian:
    """Return the posteriors q(z|x) of rows (N, F). Their means and log-variances are (N, U).

    This function encodes grey values as they are. Only training replaces grey values by random
    values 0 or 1.
    """
    found = [net.posterior(images.images(part)) for part in rows.split(READ_ROWS)]
    return Gaussian(torch.cat([q.mean for q in found]), torch.cat([q.logvar for q in found]))


def active_units(posterior: Gaussian) -> Tensor:
    """Return the indices of the active latent units, whose posterior mean differs between rows.

    A unit is active if the standard deviation of its posterior mean over rows is above 0.1, or
    above half of the largest such deviation. The result has at least one index, unless the
    posterior mean is the same for all rows.
    """
    deviation = posterior.mean.std(0, correction=0)
    return (deviation > min(ACTIVE, deviation.max().item() / 2)).nonzero().squeeze(1)


def chosen(posterior: Gaussian, units: Tensor) -> Gaussian:
    """Return the posterior of the latent units whose indices are `units`."""
    return Gaussian(posterior.mean[:, units], posterior.logvar[:, units])
