"""List the distributions of pixels.

The keys of `PIXEL_DISTRIBUTIONS` are the values of the option `likelihood`.
"""

from typing import Literal

from latentvae.likelihoods.mixture import DiscretizedLogisticMixture
from latentvae.likelihoods.pixels import (
    Bernoulli,
    DiscretizedGaussian,
    DiscretizedLogistic,
    DiscretizedLogitLaplace,
    PixelDistribution,
)

LikelihoodName = Literal[
    "bernoulli", "gaussian", "logit_laplace", "discretized_logistic", "logistic_mixture"
]

PIXEL_DISTRIBUTIONS: dict[str, type[PixelDistribution]] = {
    "bernoulli": Bernoulli,
    "gaussian": DiscretizedGaussian,
    "logit_laplace": DiscretizedLogitLaplace,
    "discretized_logistic": DiscretizedLogistic,
    "logistic_mixture": DiscretizedLogisticMixture,
}


def pixel_distribution(name: str, *, levels: int | None = None) -> PixelDistribution:
    """Return a distribution of pixels.

    Args:
        name: a key of `PIXEL_DISTRIBUTIONS`.
        levels: number of values of a pixel. The default is 2 for `bernoulli` and 256 for the other
            distributions.
    """
    kind = PIXEL_DISTRIBUTIONS[name]
    return kind() if levels is None else kind(levels)
