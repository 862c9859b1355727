"""Train classifiers on few rows with a label and many rows without a label (arXiv:1406.5298)."""

from latentvae.semi_supervised.folder import LabelledRows, keep_labels, read_images
from latentvae.semi_supervised.m1 import M1Classifier
from latentvae.semi_supervised.m1m2 import M1M2Classifier
from latentvae.semi_supervised.m2 import M2Classifier
from latentvae.semi_supervised.saving import load_classifier, save_classifier

__all__ = [
    "LabelledRows",
    "M1Classifier",
    "M1M2Classifier",
    "M2Classifier",
    "keep_labels",
    "load_classifier",
    "read_images",
    "save_classifier",
]
