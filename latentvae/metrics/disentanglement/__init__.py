"""Measure how well each dimension of a code follows one true factor of the images.

    codes: (N, D) floats      factors: (N, F) integers      one row per image, in any order

A true factor is a known property of the images, such as the size of the object that they show.

`N` images, `D` dimensions of the code, `F` factors. A code is the mean of the posterior, without
noise. All scores lie between 0 and 1, and larger is better.
"""

from latentvae.metrics.disentanglement.factor_vae_score import FactorVAEScore, factor_vae_score
from latentvae.metrics.disentanglement.importance import DCI, dci
from latentvae.metrics.disentanglement.information_gap import mig, mutual_information
from latentvae.metrics.disentanglement.predictability import predictability, sap

__all__ = [
    "DCI",
    "FactorVAEScore",
    "dci",
    "factor_vae_score",
    "mig",
    "mutual_information",
    "predictability",
    "sap",
]
