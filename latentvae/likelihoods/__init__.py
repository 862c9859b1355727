"""Likelihoods of images: what a decoder's output says about the pixels."""

from latentvae.likelihoods.logit_laplace import LogitLaplace
from latentvae.likelihoods.pixels import PixelDistribution
from latentvae.likelihoods.table import PIXEL_DISTRIBUTIONS, pixel_distribution

__all__ = ["PIXEL_DISTRIBUTIONS", "LogitLaplace", "PixelDistribution", "pixel_distribution"]
