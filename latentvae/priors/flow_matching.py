"""Flow matching on latents: the path from latents to noise, and the sampling back.

    x_sigma = (1 - sigma) x + sigma n      x latent, n noise from N(0, I), sigma in [0, 1]
    v       = n - x                        what the network learns to predict

With time t = 1 - sigma, x_sigma is the path of the papers on flow matching (arXiv:2210.02747) and
rectified flow (arXiv:2209.03003). Names and signs are those of diffusers' flow matching schedulers.
In training, sigma is logit-normal and then shifted, as in Stable Diffusion 3 (arXiv:2403.03206,
section 3.1 and equation 23).

`B` batch, `d` latent channels, `h w` latent positions.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latentvae.errors import UserError

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, sigma (B,)) -> v (velocity), with guidance
BASE_VALUES = (
    4096  # latents with this number of values have shift 1 (Zheng et al., arXiv:2510.11690)
)
MAX_STEPS = 1000


@dataclass(frozen=True)
class FlowSampling:
    """Options for drawing latents: solver, steps and guidance.

    Args:
        guidance: weight g of classifier-free guidance (arXiv:2207.12598). Let a be the velocity
            without the condition and b the velocity with the condition. The guided velocity is
            a + g (b - a). g = 1 is no guidance.
        steps: number of steps from noise to latent.
        solver: `euler` evaluates the network once in a step. `heun` evaluates the network twice in
            each step but the last, and is more exact than `euler` (arXiv:2206.00364, algorithm 1).

    Raises:
        UserError: a value is out of range.
    """

    guidance: float = 1.0
    steps: int = 25
    solver: Literal["euler", "heun"] = "euler"

    def __post_init__(self) -> None:
        if not self.guidance >= 0:
            raise UserError(f"guidance must be at least 0 (got {self.guidance:g}).")
        if not 1 <= self.steps <= MAX_STEPS:
            raise UserError(f"steps must be from 1 to {MAX_STEPS} (got {self.steps}).")
        if self.solver not in ("euler", "heun"):
            raise UserError(f"solver must be euler or heun (got {self.solver!r}).")


def default_shift(values: int) -> float:
    """Return the shift of the noise levels for a latent of `values` values.

    The shift is sqrt(values / 4096), and at least 1.

    More noise is needed to hide a latent with more values. So the noise levels of a large latent
    are shifted towards 1, which is pure noise.
    """
    return max(math.sqrt(values / BASE_VALUES), 1.0)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Return shifted noise levels in [0, 1]: shift * sigma / (1 + (shift - 1) * sigma).

    A shift above 1 moves the noise levels towards 1. A shift below 1 moves them towards 0.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigmas(count: int, *, shift: float, device: torch.device | str = "cpu") -> Tensor:
    """Draw shifted logit-normal noise levels (count,) from torch's global random generator."""
    return shifted(torch.randn(count, device=device).sigmoid(), shift)


def even_sigmas(count: int, *, shift: float) -> Tensor:
    """Return noise levels (count,) at evenly spaced quantiles of the training distribution."""
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return shifted(torch.special.ndtri(quantiles).sigmoid(), shift).float()


def noised(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return noised latents (1 - sigma) x + sigma noise, (B, d, h, w), for noise levels (B,)."""
    level = sigma.view(-1, *[1] * (x.ndim - 1))
    return (1 - level) * x + level * noise


def gaussian_loss(variances: Tensor, sigma: Tensor) -> Tensor:
    """Return the smallest loss of a velocity prediction on independent Gaussian latents, a scalar.

    Let a latent value have the variance s. At noise level sigma, x_sigma has the variance q =
    sigma^2 + (1 - sigma)^2 s, and its covariance with v is c = sigma - (1 - sigma) s. The smallest
    mean squared error of a prediction of v is Var[v] - c^2 / q, where Var[v] = 1 + s.

    Args:
        variances: variances of the latent's values or channels, any shape.
        sigma: noise levels, any shape. The result is the mean over variances and noise levels.
    """
    s, level = variances.double().flatten()[:, None], sigma.double().flatten()[None]
    covariance, variance = level - (1 - level) * s, level**2 + (1 - level) ** 2 * s
    return (1 + s - covariance**2 / variance).mean()


def noise_of(shape: Iterable[int], *, seed: int, numbers: Iterable[int]) -> Tensor:
    """Return noise (B, d, h, w) to start sampling from, given the seed and each image's number."""
    shape = tuple(shape)
    rows = [
        np.random.default_rng([seed, number]).standard_normal(shape, np.float32)
        for number in numbers
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, *shape)


@torch.no_grad()
def integrate(velocity: Velocity, noise: Tensor, *, options: FlowSampling, shift: float) -> Tensor:
    """Follow the flow from noise (B, d, h, w) at sigma 1 to latents at sigma 0."""
    levels = shifted(torch.linspace(1, 0, options.steps + 1, device=noise.device), shift)
    x = noise
    for now, after in pairwise(levels):
        step = after - now
        v = velocity(x, now.expand(len(x)))
        moved = x + step * v
        # As in the paper of this solver, the last step has no correction.
        if options.solver == "heun" and after > 0:
            moved = x + step * (v + velocity(moved, after.expand(len(x)))) / 2
        x = moved
    return x
