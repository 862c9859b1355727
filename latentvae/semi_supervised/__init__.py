"""Classifiers that learn from few labels and many rows without one (arXiv:1406.5298)."""

from latentvae.semi_supervised.m1 import M1Classifier
from latentvae.semi_supervised.m1m2 import M1M2Classifier
from latentvae.semi_supervised.m2 import M2Classifier
from latentvae.semi_supervised.saving import load_classifier, save_classifier

__all__ = [
    "M1Classifier",
    "M1M2Classifier",
    "M2Classifier",
    "load_classifier",
    "save_classifier",
]
